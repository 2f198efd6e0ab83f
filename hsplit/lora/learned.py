"""Learned tensors and their names in a checkpoint, which are written and read here alone.

A key is a kind and a name: ``residual.W.B``, ``residual.W.A``, ``residual.W.matrix``, ``common.W.B`` and ``common.W.A``
of a weight ``W`` among the server's tensors; ``held.W.B``, ``held.W.A`` or ``held.W.matrix`` of the residual that its
holders have while a change waits, and ``held.W.lag`` of what they lack; ``weight.P`` of a parameter ``P`` that a holder
trains whole, and ``optimizer.K`` of the state ``K`` of a holder's optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hsplit.lora.low_rank import concatenate
from hsplit.models.factors import LowRank

RESIDUAL, COMMON, HELD, WEIGHT, OPTIMIZER = "residual", "common", "held", "weight", "optimizer"


def with_kind(kind: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name tensors as a checkpoint does: ``kind.name``."""
    return {f"{kind}.{name}": tensor for name, tensor in named.items()}


def of_kind(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors of one kind, by name: the inverse of :func:`with_kind`."""
    return {key.removeprefix(f"{kind}."): tensor for key, tensor in tensors.items() if key.startswith(f"{kind}.")}


@dataclass(frozen=True)
class LearnedTerm:
    """State of one weight at the last aggregation, in the parts with which holders compute.

    Attributes:
        residual: ``R_w`` as factors, or ``None``.
        matrix: ``R_w`` as one matrix ``(d_out, d_in)``, where factors would be larger, or ``None``.
        common: factors that the live adapters restarted with, scale folded in, or ``None``.
    """

    residual: LowRank | None = None
    matrix: Tensor | None = None
    common: LowRank | None = None

    def whole(self) -> LowRank:
        """Return the exact sum of the parts as one pair of factors."""
        matrix = None if self.matrix is None else _as_factors(self.matrix)
        return concatenate([part for part in (self.residual, matrix, self.common) if part is not None])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the parts as a checkpoint keeps them for weight ``name``; :func:`learned_parts` reads them."""
        named = {} if self.matrix is None else {f"{RESIDUAL}.{name}.matrix": self.matrix}
        for kind, factors in ((RESIDUAL, self.residual), (COMMON, self.common)):
            if factors is not None:
                named[f"{kind}.{name}.B"] = factors.B.contiguous()
                named[f"{kind}.{name}.A"] = factors.A.contiguous()
        return named


def learned_parts(server_state: Mapping[str, Tensor]) -> dict[str, LearnedTerm]:
    """Read the state of each weight at the last aggregation; weights that learned nothing are absent.

    Args:
        server_state: the server's tensors of a checkpoint, or those of all holders together.

    Raises:
        KeyError: a factor ``B`` is without its ``A``.
    """
    residuals, commons = of_kind(RESIDUAL, server_state), of_kind(COMMON, server_state)
    kept = (key.rpartition(".") for key in (*residuals, *commons))
    names = dict.fromkeys(name for name, _, part in kept if part in ("B", "matrix"))
    return {
        name: LearnedTerm(_factors(residuals, name), residuals.get(f"{name}.matrix"), _factors(commons, name))
        for name in names
    }


def held_tensors(name: str, factors: LowRank, matrix: Tensor | None, lag: float) -> dict[str, Tensor]:
    """Return what holders have of a weight's residual while a change waits, as a checkpoint keeps it.

    Args:
        name: the weight.
        factors, matrix: the residual as they have it.
        lag: upper bound of what they lack, Frobenius norm.
    """
    named = {} if matrix is None else {"matrix": matrix}
    if factors.rank:
        named |= {"B": factors.B.contiguous(), "A": factors.A.contiguous()}
    named["lag"] = torch.tensor([lag], dtype=torch.float64)
    return with_kind(HELD, {f"{name}.{part}": tensor for part, tensor in named.items()})


def held_parts(server_state: Mapping[str, Tensor]) -> dict[str, tuple[LowRank | None, Tensor | None, float]]:
    """Read what :func:`held_tensors` made, by weight name: factors, matrix and lag."""
    named = of_kind(HELD, server_state)
    names = [key.removesuffix(".lag") for key in named if key.endswith(".lag")]
    return {n: (_factors(named, n), named.get(f"{n}.matrix"), float(named[f"{n}.lag"])) for n in names}


def learned(server_state: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """Read the sum of the residual and the adapters' common restart, by weight, as :func:`learned_parts` does."""
    return {name: term.whole() for name, term in learned_parts(server_state).items()}


def trained_weights(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Read the weights of a run that trains every weight (policy ``ft``), by parameter name in the causal LM.

    Args:
        tensors: a checkpoint's tensors by holder; one holder has the weights.

    Returns:
        Dense fp32 tensors; empty for a run that trains adapters.
    """
    return {name: tensor for own in tensors.values() for name, tensor in of_kind(WEIGHT, own).items()}


def _factors(named: Mapping[str, Tensor], name: str) -> LowRank | None:
    B = named.get(f"{name}.B")
    return None if B is None else LowRank(B, named[f"{name}.A"])


def _as_factors(matrix: Tensor) -> LowRank:
    """Write a matrix as trivially exact factors, with the identity on the smaller side."""
    d_out, d_in = matrix.shape
    if d_out <= d_in:
        return LowRank(torch.eye(d_out, dtype=matrix.dtype), matrix)
    return LowRank(matrix, torch.eye(d_in, dtype=matrix.dtype))
