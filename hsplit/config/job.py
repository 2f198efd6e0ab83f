"""The ``job`` section of a cluster file: model, data and training."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from hsplit.config.section import (
    LIST,
    NOT_EMPTY,
    AnyText,
    Count,
    NonNegative,
    OneKey,
    PathText,
    Positive,
    Section,
    Text,
    meaning,
    refuse,
    shape,
    shown,
)

MAX_SEED = 2**32 - 1
MAX_EXAMPLES = 1_000_000
"""Most examples of a generator: all of them are in memory at once."""
TORCH_OPTIMIZERS = frozenset({"adamw", "sgd"})
"""Torch's own optimizers; the others are of bitsandbytes and step in fp32."""


Wire = Literal["fp32", "bf16", "int8", "int4", "fp64"]
"""Format of the tensors in messages, see :mod:`hsplit.planning.wire`."""


DataForm = Literal[
    "e2e",
    "prompt-response",
    "prompt-completion",
    "context-completion",
    "question-answer",
    "alpaca",
    "messages",
    "sharegpt",
    "segments",
    "pairs",
    "text",
]
"""Names of :data:`hsplit.data.forms.FORMS`."""
DataColumn = Literal["prompt", "response", "text", "messages"]


class Partition(OneKey):
    """An uneven partition of the data over the clients."""

    dirichlet: Positive | None = Field(
        default=None, description="concentration alpha of each label's split over the clients; small = uneven"
    )
    unequal: Positive | None = Field(
        default=None,
        description="standard deviation of the logarithm of the clients' sizes (lognormal draws)",
    )
    shares: Annotated[tuple[Positive, ...], LIST, NOT_EMPTY] | None = Field(
        default=None, description="relative size for each client without data of its own, in their order"
    )


_PartitionChoice = Annotated[
    Annotated[
        Literal["iid", "label", "length"],
        meaning("'iid', 'label', 'length', {dirichlet: ALPHA}, {unequal: SIGMA} or {shares: [...]}"),
        Tag("<plain>"),
    ]
    | Annotated[Partition, Tag("<mapping>")],
    Discriminator(shape),
]


class MixturePart(Section):
    """One of several sources."""

    source: PathText = Field(description="as `data.source`")
    weight: Positive | None = Field(
        default=None,
        description="its part of the examples, against the others' weights; as many are taken as there are, none twice;"
        " null for all = every example of each",
    )
    form: DataForm | None = Field(default=None, description="as `data.form`, of this source")
    columns: dict[DataColumn, Text] = Field(default={}, description="as `data.columns`, of this source")
    label: Text | None = Field(
        default=None, description="as `data.label`, of this source; null = all have its name as label"
    )


BUILT_IN = "restaurants"
"""Name of the built-in source."""


class DataSpec(Section):
    """The shared data, which is partitioned over the clients without data of their own."""

    source: PathText = Field(
        default=BUILT_IN,
        description="a built-in source's name, a file, a folder or pattern of files, or `org/name:split` of the hub",
    )
    mixture: Annotated[tuple[MixturePart, ...], LIST] = Field(
        default=(), description="several sources instead of one, each with `source` and, where wanted, `weight`"
    )
    form: DataForm | None = Field(
        default=None, description="the form of its rows, of those that `hsplit data` lists; null = found by their keys"
    )
    columns: dict[DataColumn, Text] = Field(
        default={}, description="columns to take as `prompt`, `response`, `text` or `messages`, whatever their names"
    )
    train_on: Literal["last", "all", "none-but-flagged"] = Field(
        default="last",
        description="answers of a conversation that are learned: the `last`, `all`, or those that the row flags; one"
        " that is flagged not to be is never",
    )
    end_of_turn: bool = Field(
        default=True, description="learn the tokens that end an answer: its turn's, or the eos; `text` always has them"
    )
    strict: bool = Field(
        default=False, description="refuse rows that cannot be learned from, instead of leaving them out"
    )
    long: Literal["skip", "cut"] = Field(
        default="skip", description="examples over `max_length` tokens: left out, or cut to their first tokens"
    )
    examples: int = Field(
        default=3000, ge=1, le=MAX_EXAMPLES, description="examples to make, where the source is a generator"
    )
    partition: _PartitionChoice = Field(
        default="iid",
        description="how examples are dealt out to clients: `iid`, at random; `label`, each label's to one client;"
        " `length`, the shortest to the first client, and so on; or unevenly",
    )
    label: Text | None = Field(
        default=None, description="column or slot that `label` and `dirichlet` split by; null = the source's own"
    )
    separator: AnyText | None = Field(
        default=None, description="text between an example's prompt and its answer; null = the source's own"
    )
    limit: Count | None = Field(
        default=None,
        description="use at most so many examples, drawn by `seed` from the whole source, and from each client's own"
        " file; null = all",
    )
    test: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="part of the distinct prompts that no client gets, kept for `hsplit eval` (0 to 1)",
    )
    cache: bool = Field(
        default=True,
        description="keep the tokens of 5,000 or more examples in the cache of the machine that tokenized them",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if not self.mixture:
            return self
        if self.source != BUILT_IN:
            raise refuse("must be left out beside mixture, which names the sources", "source")
        without = [number for number, part in enumerate(self.mixture) if part.weight is None]
        if without and len(without) < len(self.mixture):
            raise refuse("is required, since another source has one", "mixture", without[0], "weight")
        if BUILT_IN in (names := [part.source for part in self.mixture]) and names.count(BUILT_IN) > 1:
            raise refuse(f"must have {BUILT_IN} once only", "mixture")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """All of its sources."""
        return tuple(part.source for part in self.mixture) or (self.source,)

    @property
    def origin(self) -> str:
        """The key below ``job.data`` that says where the data come from, with its value, for messages."""
        return f"mixture of {', '.join(self.sources)}" if self.mixture else f"source {self.source}"


class Validation(Section):
    """Held-out data of each client, to measure the model on."""

    share: float = Field(default=0.1, gt=0, lt=1, description="part of each client's examples held out (0 to 1)")
    max_examples: Count = Field(default=16, description="most examples held out by one client")
    every: Count = Field(
        default=1,
        description="rounds from one validation to the next; there is always one before any training, and one after the"
        " last round",
    )


class Privacy(Section):
    """Limits on the information that the server gets."""

    labels: Literal["server", "client"] = Field(
        default="server", description="where final norm, head and loss run; `client` keeps the labels there"
    )
    noise: NonNegative = Field(
        default=0.0,
        description="standard deviation of the Gaussian noise on the activations a client sends, in units of"
        " `noise_clip`; 0 = none, and no clipping; drawn from a secret of the client's, so that such a run is never"
        " repeated to the digit",
    )
    noise_clip: Positive = Field(
        default=1.0, description="L2 norm that each token's activations are clipped to before the noise"
    )


class ResidualConfig(Section):
    """Storage of the sum of all aggregated updates (METHOD.md section 6)."""

    max_rank: Annotated[Count | Literal["full"], meaning("a whole number of at least 1, or 'full'")] = Field(
        default=128, description="most directions of a residual: what is beyond is cut, and reported; `full` = no cut"
    )


class Pipeline(Section):
    """Splitting of a step's work, so that clients and server compute at the same time."""

    microbatches: Count = Field(
        default=1,
        description="parts that each batch is cut into, at most batch_size; 1 = clients and server take turns",
    )
    ahead: bool = Field(
        default=False,
        description="clients that only compute forward are a step ahead: nothing that they send depends on what the"
        " others learn within a round (with labels on the server)",
    )


class FastPaths(Section):
    """Faster ways to compute the same; each can be switched off, for comparison."""

    packed: bool = Field(default=True, description="no padding tokens in linears, norms and messages")
    loss_rows: bool = Field(default=True, description="head and loss at supervised positions only")
    fused_lora: bool = Field(default=True, description="a linear's adapter and residual in one operation")
    short_attention: bool = Field(default=True, description="attention of short sequences by plain products on CPUs")
    flat_optimizer: bool = Field(default=True, description="one optimizer step over one flat buffer")
    depth_joined: bool = Field(default=True, description="one batch of all clients at the server")


class Faults(Section):
    """Handling of actors that fail, are slow or send invalid values."""

    recovery: Literal["go_on", "repeat"] = Field(
        default="go_on",
        description="when a client is lost in a round: `go_on` = the others finish it and the client comes back for the"
        " next; `repeat` = the round is repeated from the last checkpoint, so that no number changes",
    )
    max_failures: Count = Field(
        default=3,
        description="failures of a client before the next one sets it aside, and times in a row that a round is"
        " repeated before the run ends",
    )
    deadline: Positive | None = Field(
        default=8.0,
        description="multiple of a client's median time for its part of a step after which the others go on without"
        " it in that step; null = wait for everybody",
    )
    patience_s: Positive = Field(
        default=600.0, description="seconds that a client may take for anything else before it counts as lost"
    )


def _increasing(ranks: tuple[int, ...]) -> tuple[int, ...]:
    if any(lower >= higher for lower, higher in pairwise(ranks)):
        raise refuse(f"must be increasing ranks, each once (got {shown(list(ranks))})")
    return ranks


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise refuse(f"must name each once (got {shown(list(names))})")
    return names


_Targets = Annotated[
    Literal["all-linear"] | Annotated[tuple[Text, ...], LIST, NOT_EMPTY],
    meaning("'all-linear' or a list of at least one module name"),
]


class Job(Section):
    """Model, data and training; every key has a default."""

    model: PathText = Field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        description="a hub id or a local directory",
    )
    accept_licence: Text | None = Field(
        default=None,
        description="a licence that you accept, where the packaged twin of a hub model has terms of use; the line that"
        " refuses to fetch it says which; null = none",
    )
    base: Literal["fp32", "bf16", "int8", "nf4"] = Field(
        default="nf4", description="what the frozen base weights' values are, for every holder"
    )
    dtype: Literal["auto", "fp32", "bf16", "fp64"] = Field(
        default="auto", description="type to compute in; fp64 is for checking the exactness laws"
    )
    data: DataSpec = Field(default=DataSpec(), description="the shared data")
    rounds: Count = Field(default=6, description="rounds, each ending in one aggregation")
    local_steps: Count = Field(default=10, description="optimizer steps a round")
    clients_per_round: Count | None = Field(
        default=None, description="clients drawn (seeded) to train in each round, of those there; null = all of them"
    )
    batch_size: Count = Field(default=2, description="examples in one client's batch")
    max_length: int = Field(
        default=128,
        ge=2,
        le=10**9,
        description="tokens an example may have (longer ones are left out and counted), and that plans reserve for",
    )
    grad_accumulation: Count = Field(default=1, description="batches summed before an optimizer step")
    lr: Positive = Field(default=1e-3, description="the optimizer's peak learning rate")
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "sgd"] = Field(
        default="adamw",
        description="each holder's optimizer; 8bit keeps moments as codes, paged lets them leave a GPU that is short of"
        " memory (bitsandbytes, for adapters); sgd is plain, for checking the exactness laws",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="how the learning rate goes after the warm-up, down to 0 or not"
    )
    warmup: int = Field(default=0, ge=0, le=10**9, description="steps of linear warm-up, over the whole run")
    clip: Positive | None = Field(
        default=1.0,
        description="L2 norm that gradients are clipped to: each adapted weight's, of its A and B together, to `clip`"
        " times the root of its share of the adapted entries, wherever it is held; the whole model's where a policy"
        " trains `weights`; null = none",
    )
    weight_decay: NonNegative = Field(default=0.0, description="weight decay, decoupled with adamw")
    alpha: Positive = Field(default=16.0, description="LoRA's alpha; a factor pair of rank r is scaled by alpha/r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="probability of dropping an adapter's input")
    targets: _Targets = Field(
        default="all-linear",
        description="names of the linear modules to adapt; `all-linear` = each in a layer",
    )
    rank_set: Annotated[tuple[Count, ...], LIST, NOT_EMPTY, AfterValidator(_increasing)] = Field(
        default=(1, 2, 4, 8, 16, 32), description="ranks that a plan chooses from"
    )
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="seed of everything drawn, budgets included")
    validation: Validation = Field(default=Validation(), description="held-out data")
    wire: Wire = Field(
        default="bf16",
        description="format of the activations and gradients that are sent; int8 and int4 have one scale in 64 entries,"
        " and are rounded at random, so that their mean is right",
    )
    transport: Literal["store", "gloo"] = Field(
        default="store",
        description="how these travel between actors: Ray's object store, or Ray Direct Transport (alpha) by gloo",
    )
    clock: Literal["real", "emulated"] = Field(
        default="real", description="what paces the run; emulated = everybody waits until its declared time has passed"
    )
    clock_speedup: Positive = Field(
        default=1.0, description="declared seconds in a second of the wall, where the clock is emulated"
    )
    pipeline: Pipeline = Field(default=Pipeline(), description="clients computing while the server does")
    faults: Faults = Field(default=Faults(), description="actors that fail or are slow")
    fast: FastPaths = Field(default=FastPaths(), description="what to compute faster, all on by default")
    log: Annotated[tuple[Literal["tensorboard", "wandb"], ...], LIST, AfterValidator(_each_once)] = Field(
        default=(), description="libraries that are told of the run besides its own files, each an extra to install"
    )
    keep_checkpoints: Count = Field(default=2, description="how many of the last checkpoints stay")
    privacy: Privacy = Field(default=Privacy(), description="what the server gets to see")
    residual: ResidualConfig = Field(default=ResidualConfig(), description="the store of aggregated updates")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.rounds * self.local_steps

    def validates(self, round_: int) -> bool:
        """Whether the held-out data is scored after ``round_`` rounds."""
        return round_ % self.validation.every == 0 or round_ == self.rounds

    @property
    def batches_per_step(self) -> int:
        """Batches that travel in one local step of a split model: every accumulated batch's microbatches."""
        return self.grad_accumulation * self.pipeline.microbatches

    @property
    def runs_ahead(self) -> bool:
        """True if clients that only compute forward are a step ahead of the others within a round."""
        return self.pipeline.ahead and self.privacy.labels == "server" and self.local_steps > 1

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup > self.total_steps:
            raise refuse(
                f"must be at most rounds * local_steps = {self.total_steps} steps (got {self.warmup})",
                "warmup",
            )
        return self

    @model_validator(mode="after")
    def _optimizer_is_exact_enough(self) -> Self:
        if self.dtype == "fp64" and self.optimizer not in TORCH_OPTIMIZERS:
            raise refuse(
                f"must be 'adamw' or 'sgd' with dtype 'fp64' (got {shown(self.optimizer)}, which steps in fp32)",
                "optimizer",
            )
        return self

    @model_validator(mode="after")
    def _microbatches_have_examples(self) -> Self:
        if self.pipeline.microbatches > self.batch_size:
            raise refuse(
                f"must be at most batch_size = {self.batch_size} (got {self.pipeline.microbatches})",
                "pipeline",
                "microbatches",
            )
        return self
