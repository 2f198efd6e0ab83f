"""The importance probe: ``sum |W G|`` or the spectrum of every adapted weight of a segment (METHOD 3).

A gradient with respect to a weight is ``G = delta^T x``: ``x`` is the input of its linear, ``delta`` the gradient of
its output. The probe keeps a reference to ``x`` in the forward, forms ``G`` when ``delta`` arrives in the backward,
reduces it to one number for each client and drops it. No gradient of a weight or of an adapter is ever stored. For the
largest singular values of ``G`` it need not be formed at all.

A training backward gives the same from some of its rows: a client's first examples. To keep it cheap, part of each
weight's rows stand for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsplit.lora.adapters import AdapterSet
from hsplit.models.adapted_linear import AdaptedLinear
from hsplit.models.segment import Segment
from hsplit.models.spec import LinearShape
from hsplit.seeds import hash_seed

# Rows of G and of the effective weight are formed this many bytes at a time (or one row, if it is larger).
PROBE_CHUNK_BYTES = 1 << 20
# In a training backward one row of a weight of so many is scored. Against all rows, on SmolLM2-135M over five clients:
# one in 4 ranks the weights alike (Spearman 0.997, L1 of the shares 0.04), one in 16 nearly (0.98, 0.08), one in 32
# less (0.96, 0.12); a plan follows importance that has moved by `replan.tau`, 0.1 by default.
WATCHED_ROWS = 8
WATCHED_TOKENS = 64
"""Most tokens of a client that a spectrum is found of in a training backward."""


Score = float | tuple[float, ...]
"""Importance of a weight: a number, or numbers by direction."""
SPECTRUM = 32
"""Most singular values of a weight that are found."""
# Further directions of a sketch: they make its leading ones more exact.
_OVERSAMPLED = 8
# Numbers that a sketch holds at once for each of its directions and each row and column of the weight, at most.
_SKETCHED = 5


def probe_working_bytes(
    d_out: int, d_in: int, tokens: int, directions: int, dtype: torch.dtype, spectral: bool = False
) -> int:
    """Count the most bytes that scoring one weight allocates at once, beside the activations that training keeps too.

    These are a chunk of ``G`` and one of the effective weight, or the sketches of a spectrum; for a compute dtype
    narrower than fp32 also ``x``, ``delta`` and the residual's factors, widened. A weight kept as codes is dequantized
    whole, as it is again right after in the same backward: training reserves that already.

    Args:
        d_out, d_in: the weight's shape.
        tokens: packed tokens of the batch, of all clients together.
        directions: the rank of the residual where it is applied beside the base, 0 elsewhere.
        dtype: compute dtype.
        spectral: a spectrum is found.
    """
    exact = torch.promote_types(dtype, torch.float32)
    if spectral:
        sketched = _sketched_directions(d_out, d_in)
        sketches = sketched * (_SKETCHED * (d_out + d_in) + tokens) * exact.itemsize
        return sketches if dtype == exact else sketches + tokens * (d_out + d_in) * exact.itemsize
    chunks = 2 * max(PROBE_CHUNK_BYTES, d_in * exact.itemsize)
    chunks = min(chunks, 2 * d_out * d_in * exact.itemsize)
    return chunks if dtype == exact else chunks + (tokens + directions) * (d_out + d_in) * exact.itemsize


@dataclass(frozen=True)
class ProbedRows:
    """One client's tokens in a probe.

    Attributes:
        client: its name.
        tokens: their rows among the packed tokens.
        first: the first of this holder's layers that they pass through.
        divisor: of the backward's gradient, to get that of the client's own mean loss: its supervised tokens for a
            backward of the token sum, 1 for one of the mean.
    """

    client: str
    tokens: slice
    first: int
    divisor: float


class ImportanceProbe:
    """Scores the adapted weights of a segment over one forward and one backward.

    The adapters count as part of the weights but get no gradient, so a probe does not affect training. The caller
    switches dropout off and makes the first hidden state require a gradient: with a frozen embedding no gradient would
    reach the first layer's first linears.

    Args:
        segment: the part of the model held here.
        adapters: the live factors, attached to ``segment``.
        shapes: the weights to score; those that ``segment`` does not hold are skipped.
        training: watch a training forward and backward: adapters get their gradients, and of every weight one row of
            ``WATCHED_ROWS`` is scored for all.
        draw: decides which rows those are, beside the weight's name.
        spectral: find the largest singular values of ``G`` instead; of all rows, in training of ``WATCHED_TOKENS``.
    """

    def __init__(
        self,
        segment: Segment,
        adapters: AdapterSet,
        shapes: Sequence[LinearShape],
        training: bool = False,
        draw: int = 0,
        spectral: bool = False,
    ) -> None:
        self._training, self._draw, self._spectral = training, draw, spectral
        self._segment, self._linears = segment, segment.linears
        self._adapters = adapters
        self._shapes = [shape for shape in shapes if shape.name in self._linears]
        self._rows: Sequence[ProbedRows] = ()
        self._inputs: dict[str, Tensor] = {}
        self._sums: dict[tuple[str, str], Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch a forward run inside: keep each linear's input; unless it trains, adapters get no gradient."""
        handles = [self._linears[shape.name].register_forward_hook(self._watch(shape)) for shape in self._shapes]
        adapters = self._adapters
        detached = [] if self._training else adapters.names
        try:
            for name in detached:
                live = adapters.A(name).detach(), adapters.B(name).detach()
                self._linears[name].set_adapter(*live, adapters.scale(name))
            yield
        finally:
            for name in detached:
                self._linears[name].set_adapter(adapters.A(name), adapters.B(name), adapters.scale(name))
            for handle in handles:
                handle.remove()

    def scores(
        self, output: Tensor, gradient: Tensor | None, rows: Sequence[ProbedRows]
    ) -> dict[str, dict[str, Score]]:
        """Run the backward from ``output`` and score.

        Args:
            output: result of the forward under :meth:`watching`.
            gradient: of the loss with respect to ``output``; ``None`` where ``output`` is the loss.
            rows: the tokens to score, each client alone.

        Returns:
            ``sum_ij |W_ij G_ij|`` by weight name by client, ``G`` being the gradient of that client's mean loss at the
            effective weight ``W``; or, if ``spectral``, the largest singular values of ``G``, falling.

        Raises:
            RuntimeError: no gradient reached a weight that a client's tokens passed through.
        """
        with self.scoring(rows):
            if output.requires_grad:
                output.backward(gradient)
        found = self.found()
        for row in rows:
            missing = [s.name for s in self._shapes if s.layer >= row.first and s.name not in found[row.client]]
            if missing:
                raise RuntimeError(f"no gradient of {row.client}'s probe reached {', '.join(missing)}")
        return found

    @contextmanager
    def scoring(self, rows: Sequence[ProbedRows]) -> Iterator[None]:
        """Score ``rows`` in the backward inside, which begins at a result of the forward under :meth:`watching`."""
        self._rows = rows
        try:
            yield
        finally:
            self._inputs.clear()

    def found(self) -> dict[str, dict[str, Score]]:
        """Return the scores of :meth:`scoring` by weight name by client, as far as gradients have reached weights."""
        return {
            row.client: {
                shape.name: self._of_mean_loss(self._sums[row.client, shape.name], row.divisor)
                for shape in self._shapes
                if (row.client, shape.name) in self._sums
            }
            for row in self._rows
        }

    def _of_mean_loss(self, found: Tensor, divisor: float) -> Score:
        return tuple((found / divisor).tolist()) if self._spectral else float(found) / divisor

    def _watch(self, shape: LinearShape) -> Any:
        def keep_input(linear: AdaptedLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                self._inputs[shape.name] = inputs[0].detach()
                places = self._segment.places
                output.register_hook(lambda delta: self._score(shape, linear, delta, places))

        return keep_input

    @torch.no_grad()
    def _score(self, shape: LinearShape, linear: AdaptedLinear, delta: Tensor, places: Tensor | None) -> None:
        """Reduce the gradient of one weight to a number for each client, a chunk of its rows at a time.

        Args:
            shape, linear: the weight.
            delta: gradient of its outputs.
            places: of the packed tokens among its rows, where these are padded.
        """
        exact = torch.promote_types(linear.compute_dtype, torch.float32)
        x = self._inputs.pop(shape.name).reshape(-1, shape.d_in)
        delta = delta.reshape(-1, shape.d_out)
        if places is not None:
            x, delta = x.index_select(0, places), delta.index_select(0, places)
        owners = [row for row in self._rows if shape.layer >= row.first]
        parts = [(delta[owner.tokens].to(exact), x[owner.tokens].to(exact)) for owner in owners]
        if self._spectral:
            for owner, (slopes, inputs) in zip(owners, parts, strict=True):
                # In a training backward some tokens stand for all.
                every = -(-len(slopes) // WATCHED_TOKENS) if self._training and len(slopes) else 1
                some = slice(0, None, every)
                found = shared_spectrum(slopes[some], inputs[some], hash_seed(shape.name))
                self._sums[owner.client, shape.name] = found * (len(slopes) / max(len(slopes[some]), 1))
            return
        # One row of so many, from one that differs between weights.
        stride = min(WATCHED_ROWS, shape.d_out) if self._training else 1
        first = hash_seed(shape.name, self._draw) % stride
        sums = [torch.zeros((), dtype=torch.float64, device=delta.device) for _ in owners]
        weight = _EffectiveWeight(shape.name, linear, self._adapters, exact, whole=stride == 1)
        rows = stride * max(1, PROBE_CHUNK_BYTES // (shape.d_in * exact.itemsize))
        for start in range(first, shape.d_out, rows):
            chunk = slice(start, start + rows, stride)
            W = weight.rows(chunk)
            for (slopes, inputs), total in zip(parts, sums, strict=True):
                G = slopes[:, chunk].T @ inputs
                total += G.mul_(W).abs_().sum(dtype=torch.float64)
                del G
        share = len(range(first, shape.d_out, stride)) / shape.d_out
        for owner, total in zip(owners, sums, strict=True):
            self._sums[owner.client, shape.name] = total / share


def shared_spectrum(delta: Tensor, x: Tensor, seed: int) -> Tensor:
    """Estimate the largest singular values of a gradient ``delta^T x`` that its tokens share, falling.

    The singular values of a few tokens' gradient are inflated by noise, the small ones most. So the directions are
    found on one half of the tokens, and what counts is the gradient of the other half along them: its noise has no
    preference for these directions.

    Args:
        delta: gradients of the outputs, ``(T, d_out)``.
        x: inputs, ``(T, d_in)``.
        seed: of the sketches in which the directions are found.

    Returns:
        ``(min(SPECTRUM, d_out, d_in),)`` in fp64, of the sum over all tokens: each half is scored by the other.
    """
    count = min(SPECTRUM, delta.shape[1], x.shape[1])
    values, middle = delta.new_zeros(count, dtype=torch.float64), delta.shape[0] // 2
    halves = [(delta[:middle], x[:middle]), (delta[middle:], x[middle:])]
    for (own_delta, own_x), (other_delta, other_x) in (halves, halves[::-1]):
        if own_delta.shape[0]:
            left, right = _leading_directions(own_delta, own_x, count, seed)
            values[: left.shape[1]] += ((other_delta @ left) * (other_x @ right)).sum(dim=0, dtype=torch.float64)
    return values.clamp_(min=0.0).sort(descending=True).values


def _sketched_directions(d_out: int, d_in: int) -> int:
    return min(SPECTRUM + _OVERSAMPLED, d_out, d_in)


def _leading_directions(delta: Tensor, x: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Find leading singular vectors of ``delta^T x`` by a randomized range finder.

    One power iteration, as Halko, Martinsson and Tropp (2011) advise where singular values fall slowly.

    Returns:
        The left ones, ``(d_out, n)``, and the right ones, ``(d_in, n)``: ``count`` of them, or one a token.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    size = min(_sketched_directions(delta.shape[1], x.shape[1]), delta.shape[0])
    drawn = torch.randn(x.shape[1], size, generator=generator)
    sketch = delta.T @ (x @ drawn.to(x))
    sketch = delta.T @ (x @ (x.T @ (delta @ torch.linalg.qr(sketch).Q)))
    basis = torch.linalg.qr(sketch).Q
    small = (delta @ basis).T @ x
    # The basis turned to the singular vectors: of the small square matrix only.
    squares, turn = torch.linalg.eigh(small @ small.T)
    turn = turn.flip(1)[:, :count]
    right = small.T @ turn
    lengths = squares.flip(0)[:count].clamp(min=0.0).sqrt()
    # What is rounding is no direction.
    least, tiny = torch.finfo(x.dtype).eps ** 0.5 * lengths[0], torch.finfo(x.dtype).tiny
    right = torch.where(lengths > least, right / lengths.clamp(min=tiny), 0.0)
    return basis @ turn, right


class _EffectiveWeight:
    """The weight ``W_0 + R + s B A`` of one linear, by chunks of rows in dtype ``exact``.

    The base's values are in the compute dtype, as in the forward: a dense store is read in place, codes are dequantized
    whole, or, where few rows are wanted, row by row.
    """

    def __init__(self, name: str, linear: AdaptedLinear, adapters: AdapterSet, exact: torch.dtype, whole: bool) -> None:
        self._exact, self._dtype, self._stored = exact, linear.compute_dtype, linear.weight
        self._base = linear.weight.dense(linear.compute_dtype) if whole else None
        # A merged residual is part of the base's working weight; otherwise it is one of these two.
        self._matrix, residual = linear._residual_matrix, linear._residual
        self._terms: list[tuple[Tensor, Tensor, float]] = []
        if residual is not None:
            self._terms.append((residual.B.to(exact), residual.A.to(exact), 1.0))
        if name in adapters.names:
            B, A = adapters.B(name).detach(), adapters.A(name).detach()
            device = linear.device
            self._terms.append((B.to(device, exact), A.to(device, exact), adapters.scale(name)))

    def rows(self, chunk: slice) -> Tensor:
        """Return a copy of rows ``chunk`` of the weight: ``(rows, d_in)``."""
        base = self._stored.rows(chunk, self._dtype) if self._base is None else self._base[chunk]
        values = base.to(self._exact, copy=True)
        if self._matrix is not None:
            values += self._matrix[chunk]
        for B, A, scale in self._terms:
            values.addmm_(B[chunk], A, alpha=scale)
        return values
