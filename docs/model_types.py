"""The table of model types in ``docs/models.md``: every causal LM of the installed transformers, proved or refused.

python -m docs.model_types [TYPE ...]     # with types, prints what is found and writes nothing
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsplit.errors import InputError, error_text
from hsplit.models import packed_types
from hsplit.models.families import written_family
from hsplit.models.proof import LENGTHS, Proof, prove

PAGE = Path(__file__).parent / "models.md"
PACKED = Path(packed_types.__file__)
# Packed rows are tried with these too.
OTHER_LENGTHS = (2, 9, 6, 1)
BEGIN, END = "<!-- types -->", "<!-- end of types -->"

# What real checkpoints of a type have and the defaults of transformers leave out.
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
}
# Encoders that can be decoders.
ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
)
CHANGES |= {kind: {"is_decoder": True} for kind in ENCODERS}


@dataclass(frozen=True)
class Found:
    """What came of one type.

    Attributes:
        kind: the model type.
        proof: of an exact type.
        packed: its layers compute packed rows.
        why: of a refused type.
        seconds: that it took.
    """

    kind: str
    proof: Proof | None
    packed: bool
    why: str
    seconds: float

    @property
    def row(self) -> str:
        """Line of the table."""
        if self.proof is None:
            return f"| `{self.kind}` | refused | {self.why} |"
        how = "packed" if self.packed else "padded"
        return f"| `{self.kind}` | exact, {how} | loss {self.proof.loss:.0e}, gradients {self.proof.gradient:.0e} |"


def model_types() -> list[str]:
    """List the model types of which the installed transformers has a causal LM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def find(kinds: Sequence[str]) -> Iterator[Found]:
    """Prove each of ``kinds`` with transformers' default configuration of it."""
    from transformers import AutoConfig

    for kind in kinds:
        start = time.perf_counter()
        proof, packed, why = None, False, ""
        try:
            config = AutoConfig.for_model(kind, **CHANGES.get(kind, {}))
            proof = prove(config, packed=False)
            packed = proof.packed or _is_exact_packed(config)
        except InputError as error:
            why = str(error).partition("is not served: ")[2] or str(error)
        except Exception as error:  # defaults that transformers' own checks refuse
            why = f"transformers' default configuration of it makes no model: {error_text(error)}"
        yield Found(kind, proof, packed, why.replace("|", "\\|"), time.perf_counter() - start)


def _is_exact_packed(config: Any) -> bool:
    try:
        return all(prove(config, lengths, packed=True).packed for lengths in (LENGTHS, OTHER_LENGTHS))
    except InputError:
        return False


def table(found: Sequence[Found]) -> str:
    """Lay out the table, with a line that sums it up."""
    import torch
    import transformers

    exact = [one for one in found if one.proof is not None]
    packed = sum(one.packed for one in exact)
    # Of up to three proofs: padded, and twice packed.
    seconds = sorted(one.seconds / (3 if one.packed else 2) for one in exact)
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}: {len(found)} types,"
        f" {len(exact)} exact ({packed} packed, {len(exact) - packed} padded), {len(found) - len(exact)} refused."
        f" A proof takes {seconds[len(seconds) // 2]:.1f} s at the median and {seconds[-1]:.1f} s at most.",
        "",
        "| Type | | Largest relative error against the unsplit model, or why not |",
        "| --- | --- | --- |",
        *(one.row for one in found),
    ]
    return "\n".join(lines)


def main(kinds: Sequence[str]) -> None:
    """Write the page, or print what is found of ``kinds``."""
    found = []
    for one in find(kinds or model_types()):
        print(f"{one.seconds:5.1f} s  {one.row}", flush=True)
        found.append(one)
    if not kinds:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.partition(BEGIN)[0], page.partition(END)[2]
        own = [one.kind for one in found if one.packed and not written_family(one.kind)]
        lines = "".join(f'        "{kind}",\n' for kind in own)
        docstring = PACKED.read_text(encoding="utf-8").partition("PACKED_TYPES")[0]
        listed = f"PACKED_TYPES: frozenset[str] = frozenset(\n    [\n{lines}    ]\n)\n"
        PACKED.write_text(docstring + listed, encoding="utf-8")
        PAGE.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
