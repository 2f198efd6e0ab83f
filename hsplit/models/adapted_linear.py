"""``AdaptedLinear``: the training forward of every linear of a decoder layer, on clients and server alike.

It computes with the effective weight ``W_0 + R + s B A`` of METHOD 1. The residual ``R`` is applied by the exactness
rule of METHOD 6: dense bases carry it in a working weight that is formed from ``W_0`` each time, quantized bases apply
it beside the base, in one pair of thin products with the live adapter. Where memory allows, the server of a quantized
base that computes in fp32 keeps a working copy of ``W_0 + R`` beside the codes, formed from both whenever the residual
changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from hsplit.models.factors import LowRank
from hsplit.models.weights import DenseWeight, FrozenWeight, frozen_linear

# Rows of a working copy that are formed at once.
FORMED_AT_ONCE = 256


class _AddLowRank(torch.autograd.Function):
    """``y + x ([B_R, s B] [A_R; A])^T``, in place on ``y``; gradients for ``y``, ``x`` and the live ``A`` and ``B``.

    Beside ``x`` only the live part of ``x A^T`` is kept for the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, residual: LowRank | None, A: Tensor | None, B: Tensor | None, scale: float
    ) -> Tensor:
        down, up = _stacked(residual, A, B, scale, x)
        inner = x @ down.T
        # In place: y is the new output of the base product, which did not save it.
        y.addmm_(inner, up.T)
        ctx.mark_dirty(y)
        ctx.residual, ctx.scale = residual, scale
        live = None if A is None else inner[:, -A.shape[0] :].clone()
        ctx.save_for_backward(x if A is not None else None, live, A, B)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, live, A, B = ctx.saved_tensors
        down, up = _stacked(ctx.residual, A, B, ctx.scale, grad)
        inner = grad @ up
        grad_x = inner @ down if ctx.needs_input_grad[1] else None
        grad_A = grad_B = None
        if A is not None:
            grad_A = (inner[:, -A.shape[0] :].T @ x).to(A.device, A.dtype)
            grad_B = (grad.T @ live).to(B.device, B.dtype).mul_(ctx.scale)
        return grad, grad_x, None, grad_A, grad_B, None


def _stacked(
    residual: LowRank | None, A: Tensor | None, B: Tensor | None, scale: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """``[A_R; A]``, ``(R + r, d_in)``, and ``[B_R, s B]``, ``(d_out, R + r)``, in dtype and device of ``like``."""
    down = [] if residual is None else [residual.A]
    up = [] if residual is None else [residual.B]
    if A is not None and B is not None:
        # Another device only where a server's layers are on several GPUs.
        down.append(A.to(like.device, like.dtype))
        up.append((scale * B).to(like.device, like.dtype))
    return (down[0], up[0]) if len(down) == 1 else (torch.cat(down), torch.cat(up, dim=1))


def add_low_rank(
    y: Tensor,
    x: Tensor,
    residual: LowRank | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    fused: bool = True,
) -> Tensor:
    """Add the residual's and the live adapter's part to ``y``; ``y`` may be changed in place.

    Args:
        y: ``(n, d_out)``, the base's output.
        x: ``(n, d_in)``.
        residual: factors in the compute dtype, or ``None``.
        A, B: live factors ``(r, d_in)`` and ``(d_out, r)`` in their master dtype, on any device, or ``None``.
        scale: ``s = alpha / r``.
        fused: one operation for both parts, which keeps less for the backward; else plain products.
    """
    if residual is None and A is None:
        return y
    if fused:
        return cast(Tensor, _AddLowRank.apply(y, x, residual, A, B, scale))
    if residual is not None:
        y = y + (x @ residual.A.T) @ residual.B.T
    if A is not None and B is not None:
        y = y + (x @ A.to(x.device, x.dtype).T) @ B.to(x.device, x.dtype).T * scale
    return y


_NO_ADAPTER = (None, None, 1.0)


class AdaptedLinear(nn.Module):
    """A frozen linear with a residual and a live LoRA adapter.

    Args:
        name: the weight's name: the module's path in the causal LM.
        weight: ``W_0`` as stored by this holder, shape ``(d_out, d_in)``.
        bias: ``(d_out,)`` or ``None``; frozen.
        pristine: reads ``W_0`` again, for bases that are merged into; ``None`` for quantized bases, which never are.
        compute_dtype: dtype of the activations.
    """

    def __init__(
        self,
        name: str,
        weight: FrozenWeight,
        bias: Tensor | None,
        pristine: Callable[[], Tensor] | None,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.name = name
        self.compute_dtype = compute_dtype
        self.weight = weight
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        self._pristine = pristine
        self._residual: LowRank | None = None
        self._residual_matrix: Tensor | None = None
        # W_0 + R (d_out, d_in) in the compute dtype, where it is kept beside the codes.
        self._working_copy: Tensor | None = None
        # In a tuple, which nn.Module does not register: the factors belong to the holder's AdapterSet.
        self._adapter: tuple[Tensor | None, Tensor | None, float] = _NO_ADAPTER
        self.dropout = 0.0
        self.fused = True

    @property
    def device(self) -> torch.device:
        """Device of the weight; the adapter's factors may be on another one."""
        return next(iter((*self.weight.buffers(), *self.weight.parameters()))).device

    @property
    def merges(self) -> bool:
        """True if the residual goes into a working weight (dense bases), not beside the base (quantized ones)."""
        return self._pristine is not None

    def set_adapter(self, A: Tensor, B: Tensor, scale: float) -> None:
        """Train with factors ``A (r, d_in)`` and ``B (d_out, r)``; they stay the caller's tensors."""
        self._adapter = (A, B, scale)

    def remove_adapter(self) -> None:
        """Compute with base and residual alone."""
        self._adapter = _NO_ADAPTER

    def append_residual(self, start_rank: int, factors: LowRank) -> None:
        """Keep the first ``start_rank`` directions of the residual and append ``factors``.

        A merged base needs the whole residual, so ``start_rank`` is 0 there.
        """
        if self._pristine is not None:
            if start_rank:
                raise ValueError(f"{self.name}: a merged base takes its residual whole, not from rank {start_rank}")
            self._merge(factors.to(torch.promote_types(factors.A.dtype, torch.float32)).dense())
            return
        new = factors.to(self.compute_dtype)
        if self._residual is not None and start_rank:
            kept = self._residual
            new = LowRank(torch.cat([kept.B[:, :start_rank], new.B], dim=1), torch.cat([kept.A[:start_rank], new.A]))
        self._residual = new if new.rank else None
        self._residual_matrix = None
        self._form_working_copy()

    def set_residual_matrix(self, matrix: Tensor) -> None:
        """Take the residual as one matrix ``(d_out, d_in)``: of ``residual.max_rank: full``, once that is smaller."""
        self._residual = None
        if self.merges:
            self._merge(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
        else:
            self._residual_matrix = matrix.to(self.compute_dtype)
            self._form_working_copy()

    @property
    def has_working_copy(self) -> bool:
        """True if it computes with a working copy beside the codes of a quantized base."""
        return self._working_copy is not None

    def keep_working_copy(self, kept: bool) -> None:
        """Compute with a copy of ``W_0 + R`` in the compute dtype, beside the codes of a quantized base, or without.

        The copy takes the memory of a dense weight. It saves dequantizing the codes and applying the residual in every
        pass.

        Raises:
            ValueError: the base is merged into, and has no codes.
        """
        if kept and self.merges:
            raise ValueError(f"{self.name}: a merged base is its own working copy")
        if not kept:
            self._working_copy = None
        elif self._working_copy is None:
            self._working_copy = torch.empty(self.weight.shape, dtype=self.compute_dtype, device=self.device)
            self._form_working_copy()

    def forward(self, x: Tensor) -> Tensor:
        """``x (W_0 + R + s B A)^T + bias`` for ``x`` of shape ``(..., d_in)``."""
        rows = x.reshape(-1, x.shape[-1])
        residual = self._residual
        if self._working_copy is not None:
            y = torch.nn.functional.linear(rows, self._working_copy, self.bias)
            residual = None
        else:
            y = frozen_linear(rows, self.weight, self.bias)
            if self._residual_matrix is not None:
                y = y + torch.nn.functional.linear(rows, self._residual_matrix)
        if self.training and self.dropout and self._adapter[0] is not None:
            y = add_low_rank(y, rows, residual, None, None, 1.0, self.fused)
            y = add_low_rank(y, torch.nn.functional.dropout(rows, self.dropout), None, *self._adapter, self.fused)
        else:
            y = add_low_rank(y, rows, residual, *self._adapter, self.fused)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        # The residual beside the base is no buffer, but moves with the weight.
        super()._apply(fn, recurse)
        if self._residual is not None:
            self._residual = LowRank(fn(self._residual.B), fn(self._residual.A))
        if self._residual_matrix is not None:
            self._residual_matrix = fn(self._residual_matrix)
        if self._working_copy is not None:
            self._working_copy = fn(self._working_copy)
        return self

    @torch.no_grad()
    def _form_working_copy(self) -> None:
        """Form the working copy, if one is kept, from codes and residual, so that rounding never accumulates."""
        if self._working_copy is None:
            return
        exact = torch.promote_types(self.compute_dtype, torch.float32)
        factors = None if self._residual is None else self._residual.to(exact)
        for start in range(0, self._working_copy.shape[0], FORMED_AT_ONCE):
            chosen = slice(start, start + FORMED_AT_ONCE)
            # W_0 as every other holder has it: in the compute dtype.
            values = self.weight.rows(chosen, self.compute_dtype).to(exact)
            if factors is not None:
                values = values.addmm(factors.B[chosen], factors.A)
            if self._residual_matrix is not None:
                values = values + self._residual_matrix[chosen].to(exact)
            self._working_copy[chosen] = values

    def _merge(self, residual: Tensor) -> None:
        assert self._pristine is not None and isinstance(self.weight, DenseWeight)
        # W_0 is read again, so that rounding to the working dtype never accumulates over rounds.
        working = self._pristine().to(residual).add_(residual)
        self.weight.values.copy_(working)
