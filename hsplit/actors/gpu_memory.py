"""Memory of a GPU that a holder shares with others: a limit at what plans declare, and memory given back."""

from __future__ import annotations

import torch

ALLOWANCE = 0.25
"""Part of the declared memory, and beside it :data:`ALLOWANCE_BYTES`, that a process may reserve beyond it.

PyTorch's allocator reserves blocks of up to 20 MiB and cuts them up, so that a holder whose tensors keep to their plan
reserves more than they take. A peak of the tensors themselves above the declared memory is measured, and the next plan
gives that holder less (``policy.replan.measured``); this limit protects the other holders from one that runs away.
"""
ALLOWANCE_BYTES = 64 << 20


class GpuMemory:
    """The memory that this process reserves of one GPU; nothing is done on a CPU, or on several GPUs, which are whole.

    Args:
        device: where the holder computes.

    Attributes:
        limited: :meth:`allow` sets limits. For a holder with a process of its own: they are the process's.
    """

    def __init__(self, device: torch.device) -> None:
        self._shared = device.type == "cuda" and (device.index is not None or torch.cuda.device_count() == 1)
        self._index = device.index or 0
        self._beside: int | None = None
        self.limited = False

    def allow(self, declared_bytes: int) -> None:
        """Let the process reserve the memory of a plan and an allowance, beside what it had reserved before the first.

        To allocate more raises ``torch.OutOfMemoryError``, even where the GPU has room.

        Args:
            declared_bytes: the holder's budget; 0 for none.
        """
        if not (self._shared and self.limited):
            return
        if self._beside is None:
            # The workspaces of matrix products.
            self._beside = torch.cuda.memory_reserved(self._index)
        total_bytes = torch.cuda.get_device_properties(self._index).total_memory
        most = self._beside + (1 + ALLOWANCE) * declared_bytes + ALLOWANCE_BYTES
        share = min(1.0, most / total_bytes) if declared_bytes else 1.0
        torch.cuda.set_per_process_memory_fraction(share, self._index)

    def give_back(self) -> None:
        """Return reserved memory that no tensor uses to the GPU, for other processes."""
        if self._shared:
            torch.cuda.empty_cache()
