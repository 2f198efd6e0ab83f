"""The tail of the model: final norm, head and loss, at supervised positions only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

# Rows of logits held at once: 64 rows of a 49,152-word vocabulary are 12.6 MB in fp32. With fewer the head is read more
# often, so the server takes many; on a client memory is scarce.
SERVER_CHUNK_ROWS = 64
CLIENT_CHUNK_ROWS = 8
# BLAS computes an incomplete block row by row, and sums over the vocabulary ten times less exactly (measured: 4e-6
# against 4e-7 of the gradient). Whole blocks avoid it.
BLOCK_ROWS = 8

LogitsOf = Callable[[Tensor], Tensor]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of ``x W^T`` without holding all logits at once.

    The head is frozen, so the gradient with respect to ``x`` is formed with the loss, chunk by chunk, and is all that
    is kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        rows_given = x.shape[0]
        missing = -rows_given % BLOCK_ROWS
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
        targets = torch.nn.functional.pad(targets, (0, missing))
        losses = torch.empty(x.shape[0], dtype=exact, device=x.device)
        grads = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for start in range(0, x.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = (x[rows] @ weight.T).to(exact)
            target = targets[rows].unsqueeze(1)
            log_total = logits.logsumexp(dim=1, keepdim=True)
            losses[rows] = (log_total - logits.gather(1, target)).squeeze(1)
            if grads is not None:
                slope = logits.sub_(log_total).exp_()
                slope.scatter_add_(1, target, -torch.ones_like(target, dtype=exact))
                grads[rows] = slope.to(x.dtype) @ weight
                del slope
            # Freed before the next chunk's logits.
            del logits
        if grads is not None:
            ctx.save_for_backward(grads[:rows_given])
        return losses[:rows_given]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (upstream,) = grads
        (slope,) = ctx.saved_tensors
        return slope * upstream.to(slope.dtype).unsqueeze(1), None, None, None


class _ChunkedOwnLoss(torch.autograd.Function):
    """Cross-entropy of a model's own logits without holding all at once, as :class:`_ChunkedCrossEntropy`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits_of: LogitsOf, targets: Tensor, chunk_rows: int) -> Tensor:
        losses, grads = [], []
        for rows, target in zip(x.split(chunk_rows), targets.split(chunk_rows), strict=True):
            given = rows.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                logits = logits_of(given)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
                if ctx.needs_input_grad[0]:
                    grads += torch.autograd.grad(loss.sum(), given)
            losses.append(loss.detach())
            # Freed before the next chunk's logits.
            del logits, loss
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses) if losses else x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (upstream,) = grads
        (slope,) = ctx.saved_tensors
        return slope * upstream.to(slope.dtype).unsqueeze(1), None, None, None


class TailLosses(nn.Module, ABC):
    """Cross-entropy at supervised positions, from the last layer's output."""

    def supervised_losses(self, hidden: Tensor, targets: Tensor, rows_only: bool = True) -> Tensor:
        """Compute the cross-entropy at the supervised positions.

        Args:
            hidden: ``(n, d)``, the last layer's output.
            targets: ``(n,)`` int64, the id that each position must predict, or -100.
            rows_only: skip the other positions.

        Returns:
            A loss for each supervised position, in their order, as :meth:`token_losses`.
        """
        at = targets != -100
        if rows_only:
            return self.token_losses(hidden[at], targets[at])
        return self.token_losses(hidden, targets.clamp_min(0))[at]

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Compute the cross-entropy of each row.

        Args:
            hidden: ``(n, d)``, the last layer's output at supervised positions.
            targets: ``(n,)`` int64, the id that each position must predict.

        Returns:
            ``(n,)`` losses in fp32 (fp64 for fp64 input), differentiable in ``hidden``; NaN for a row whose L2 norm is
            not finite.
        """
        # The final norm turns a row whose square overflows into zeros: a diverged model would have the finite loss of a
        # uniform prediction.
        exact = torch.promote_types(hidden.dtype, torch.float32)
        overflow = 0.0 * torch.linalg.vector_norm(hidden.detach(), dim=1, dtype=exact)
        return self._losses(hidden, targets) + overflow

    @abstractmethod
    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of each row, ``(n,)``."""


class OwnTail(TailLosses):
    """The tail of a model as its own forward computes it: scales, caps and biases of logits included.

    Args:
        logits_of: computes logits ``(n, vocabulary)`` of hidden states ``(n, d)``, each row alone.
        chunk_rows: rows of logits held at once; ``None`` for all, with gradients for what they are computed with.
    """

    def __init__(self, logits_of: LogitsOf, chunk_rows: int | None) -> None:
        super().__init__()
        self._logits_of, self._chunk_rows = logits_of, chunk_rows

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self._chunk_rows is None:
            exact = torch.promote_types(hidden.dtype, torch.float32)
            logits = self._logits_of(hidden).to(exact)
            return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return cast(Tensor, _ChunkedOwnLoss.apply(hidden, self._logits_of, targets, self._chunk_rows))


class Tail(TailLosses):
    """Final norm and head, frozen but for :meth:`train_head`.

    Args:
        norm: the final norm.
        head: ``(vocabulary, d)``; may be the embedding's own tensor.
        chunk_rows: rows of logits held at once.
    """

    def __init__(self, norm: nn.Module, head: Tensor, chunk_rows: int) -> None:
        super().__init__()
        self.norm = norm
        self._chunk_rows = chunk_rows
        self.head: Tensor
        self.register_buffer("head", head)

    def train_head(self, head: nn.Parameter) -> None:
        """Replace the head by one that gets gradients, for full fine-tuning: then all logits are held at once."""
        del self.head
        self.register_parameter("head", head)

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self.head.requires_grad:
            exact = torch.promote_types(hidden.dtype, torch.float32)
            logits = torch.nn.functional.linear(self.norm(hidden), self.head)
            return torch.nn.functional.cross_entropy(logits.to(exact), targets, reduction="none")
        # Some models keep what flows between layers in fp32, in bf16 too.
        normed = self.norm(hidden).to(self.head.dtype)
        return cast(Tensor, _ChunkedCrossEntropy.apply(normed, self.head, targets, self._chunk_rows))
