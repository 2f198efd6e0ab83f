"""Time by phase and peak memory of an actor's calls (METHOD 4).

On CUDA the bytes are the caching allocator's own counters. On a CPU they follow from the events that PyTorch's
allocator reports to its profiler: every block with its address, allocated or freed. Nothing is shared with the code
that predicts memory.

Not seen on a CPU: memory that does not come from PyTorch's allocator (Python objects, tokens, workspaces inside a
kernel), and allocations of threads other than the caller's, on which a backward pass runs on a CPU.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.multiprocessing.reductions import StorageWeakRef


class Stopwatch:
    """Measures wall time by phase.

    A phase ends when its work is done: on CUDA, which works asynchronously, it waits for the device.

    Args:
        device: where the work runs.

    Attributes:
        seconds: by phase, see :data:`hsplit.observe.tables.PHASES`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside towards phase ``name``."""
        begun = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._add(name, time.perf_counter() - begun)

    def pace(self, seconds: float | None) -> None:
        """Sleep until ``seconds`` have passed since the start (``clock: emulated``, METHOD 8); ``None``: do not.

        A call that is more than 5 % late has no phase ``paced``.
        """
        if seconds is None:
            return
        left = seconds - (time.perf_counter() - self._begun)
        if left < -0.05 * seconds and seconds > 0:
            return
        time.sleep(max(left, 0.0))
        self._add("paced", max(left, 0.0))

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


# The profiler's library logs every start and stop to stderr; it reads its log level at its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# The rounds that are measured: the first ones, and every tenth.
_FIRST_ROUNDS = 3
_EVERY = 10

_Method = TypeVar("_Method", bound=Callable[..., Any])


class PeakMemory:
    """Measures the most bytes allocated above those at the start.

    A holder's method calls are separate windows, and a profiler runs only inside them. Blocks are followed by address,
    so that what one window leaves allocated is there when the next begins. Tensors that cross a window's border, as
    arguments or as results, are watched by weak references: they count from when the holder has them until their last
    reference is gone, wherever that is. Arrays among the arguments count while the call works on them.

    Blocks that are allocated between windows, and stay, are not seen.

    Args:
        device: where the holder computes. On CUDA the counters are the process's, with one holder in a process; those
            of several GPUs are added up, though their peaks may not coincide.
        enabled: if not, nothing is measured and :meth:`peak_bytes` is 0.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self._cuda = enabled and device.type == "cuda"
        self._profiles = enabled and not self._cuda
        # "cuda" stands for all GPUs that the process sees: several, where a server's layers are spread over them.
        several = self._cuda and device.index is None
        self._gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if several else [device]
        self._live: dict[int, int] = {}
        self._watched: dict[int, StorageWeakRef] = {}
        self._now = self._peak = 0
        self._open = False
        # Rounds begun since the holder's part of the model last changed.
        self._round = 0
        self._steps: set[int] = set()
        self._measured: set[str] = set()
        self._start = 0
        if self._cuda:
            for gpu in self._gpus:
                _take_workspaces(gpu)
            self._start = sum(map(torch.cuda.memory_allocated, self._gpus))
            self._reset_gpus()

    def peak_bytes(self) -> int:
        """Return the most bytes above the start since the last call, and begin again from those held now.

        0 on a CPU in a round that is not measured.
        """
        if self._cuda:
            most = sum(map(torch.cuda.max_memory_allocated, self._gpus)) - self._start
            self._reset_gpus()
            return most
        self._forget_expired()
        most, self._peak = self._peak, self._now
        return most if self.measures_round else 0

    @contextmanager
    def window(self, *received: Any) -> Iterator[Callable[[Any], None]]:
        """Measure the code inside. A window inside another is part of it.

        Args:
            received: the call's arguments; tensors and arrays in them count as the holder's.

        Yields:
            A function that takes the call's result, whose tensors are followed beyond the window.
        """
        if not self._profiles or self._open:
            yield lambda result: None
            return
        self._forget_expired()
        beside = self._receive(received)
        self._peak = max(self._peak, self._now + beside)
        results: list[Any] = []
        profiler = torch.autograd.profiler.profile(profile_memory=True)
        self._open = True
        try:
            with profiler:
                yield results.append
        finally:
            self._open = False
            for address, size in _blocks(profiler):
                self._follow(address, size)
                self._peak = max(self._peak, self._now + beside)
            for storage in _storages([*_leaves(results, Tensor), *_tensors_of_arrays(results)]):
                if storage.data_ptr() in self._live:
                    self._watched[storage.data_ptr()] = StorageWeakRef(storage)

    @property
    def measures_round(self) -> bool:
        """True in a round that is measured: the first three with a part, which differ, and then every tenth.

        A profiler adds a constant time to each operation, which slows down small models most.
        """
        return self._cuda or self._round <= _FIRST_ROUNDS or self._round % _EVERY == 0

    def begin_part(self) -> None:
        """Count rounds again from 0: the holder has another part of the model, or another state."""
        self._round = 0
        self._begin()

    def begin_round(self) -> None:
        """Begin a round: measure again what is measured only once or twice in one."""
        self._round += 1
        self._begin()

    def _begin(self) -> None:
        self._steps.clear()
        self._measured.clear()

    def selects_step(self, step: int) -> bool:
        """Select the first two steps since :meth:`begin_round`, in a round that is measured.

        The first makes the optimizer's moments, the second is the first to run beside them; later ones leave nothing
        more allocated.
        """
        if step not in self._steps and len(self._steps) < 2:
            self._steps.add(step)
        return self.measures_round and step in self._steps

    def selects_call(self, method: str) -> bool:
        """Select the first call of ``method`` since :meth:`begin_round`, in a round that is measured."""
        first = method not in self._measured
        self._measured.add(method)
        return self.measures_round and first

    def _reset_gpus(self) -> None:
        for gpu in self._gpus:
            torch.cuda.reset_peak_memory_stats(gpu)

    def _receive(self, received: Any) -> int:
        """Follow the tensors among the arguments; returns the bytes of the arrays beside them."""
        for storage in _storages(_leaves(received, Tensor)):
            address = storage.data_ptr()
            if address not in self._live:
                self._follow(address, storage.nbytes())
                self._watched[address] = StorageWeakRef(storage)
        # An array over the memory of a tensor that is followed already does not count twice.
        arrays = {array.ctypes.data: array.nbytes for array in _leaves(received, np.ndarray)}
        return sum(size for address, size in arrays.items() if address not in self._live)

    def _follow(self, address: int, size: int) -> None:
        """Record that ``size`` bytes were allocated at ``address``, or the block there freed (``size <= 0``)."""
        self._watched.pop(address, None)
        # An address that is allocated a second time was freed outside of the windows.
        self._now -= self._live.pop(address, 0)
        if size > 0:
            self._live[address] = size
            self._now += size

    def _forget_expired(self) -> None:
        for address in [a for a, storage in self._watched.items() if storage.expired()]:
            self._follow(address, 0)


def measured_with_part(method: _Method) -> _Method:
    """Measure every call of a holder's ``method`` that gives it another part of the model, or another state.

    The holder keeps its :class:`PeakMemory` as ``_memory``.
    """
    return _always(method, PeakMemory.begin_part)


def measured_with_round(method: _Method) -> _Method:
    """Measure every call of a holder's ``method`` that begins a round, which leaves blocks to be followed."""
    return _always(method, PeakMemory.begin_round)


def measured_always(method: _Method) -> _Method:
    """Measure every call of a holder's ``method``, which may leave blocks allocated that must be followed."""
    return _always(method, lambda memory: None)


def _always(method: _Method, begin: Callable[[PeakMemory], None]) -> _Method:
    @functools.wraps(method)
    def call(holder: Any, *arguments: Any) -> Any:
        begin(holder._memory)
        return _windowed(method, holder, arguments)

    return cast(_Method, call)


def measured(method: _Method) -> _Method:
    """Measure a holder's ``method``, which leaves nothing allocated, in the rounds that are measured."""

    @functools.wraps(method)
    def call(holder: Any, *arguments: Any) -> Any:
        return _windowed(method, holder, arguments) if holder._memory.measures_round else method(holder, *arguments)

    return cast(_Method, call)


def measured_in_first_steps(method: _Method) -> _Method:
    """Measure a holder's ``method(step, ...)`` in the first two local steps of a round that is measured."""

    @functools.wraps(method)
    def call(holder: Any, step: int, *arguments: Any) -> Any:
        if holder._memory.selects_step(step):
            return _windowed(method, holder, (step, *arguments))
        return method(holder, step, *arguments)

    return cast(_Method, call)


def measured_once_a_round(method: _Method) -> _Method:
    """Measure the first call of a holder's ``method`` in a round that is measured: a validation's first batch."""

    @functools.wraps(method)
    def call(holder: Any, *arguments: Any) -> Any:
        if holder._memory.selects_call(method.__name__):
            return _windowed(method, holder, arguments)
        return method(holder, *arguments)

    return cast(_Method, call)


def _windowed(method: Callable[..., Any], holder: Any, arguments: tuple[Any, ...]) -> Any:
    with holder._memory.window(*arguments) as returns:
        result = method(holder, *arguments)
        returns(result)
    return result


def _take_workspaces(gpu: torch.device) -> None:
    """Make cuBLAS allocate its workspaces now, since they belong to the runtime and to no holder.

    On an H100 they are 32 MiB for each thread that multiplies: this one, and autograd's.
    """
    weight = torch.ones(16, 16, device=gpu, requires_grad=True)
    (weight @ weight).sum().backward()


def _blocks(profiler: Any) -> list[tuple[int, int]]:
    """List address and size of every block that was allocated, or freed (size below 0), in the order of time."""
    events = list(reversed(profiler.kineto_results.experimental_event_tree()))
    found = []
    while events:
        event = events.pop()
        events.extend(reversed(event.children))
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    # Stable: the tree gives a thread's events in their order.
    found.sort(key=lambda block: block[0])
    return [(address, size) for _, address, size in found]


def _storages(tensors: list[Any]) -> list[torch.UntypedStorage]:
    return [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu" and tensor.nbytes]


def _tensors_of_arrays(values: Any) -> list[Tensor]:
    """Find the tensors whose memory the arrays in ``values`` are views of."""
    return [owner for array in _leaves(values, np.ndarray) if isinstance(owner := _owner(array), Tensor)]


def _owner(array: Any) -> Any:
    while isinstance(array, np.ndarray):
        array = array.base
    return array


def _leaves(value: Any, kind: type) -> list[Any]:
    """Collect every object of ``kind`` inside sequences, mappings and dataclasses."""
    if isinstance(value, kind):
        return [value]
    if isinstance(value, Mapping):
        inner: list[Any] = list(value.values())
    elif isinstance(value, list | tuple):
        inner = list(value)
    elif is_dataclass(value):
        inner = [getattr(value, field.name) for field in fields(value)]
    else:
        return []
    return [leaf for part in inner for leaf in _leaves(part, kind)]
