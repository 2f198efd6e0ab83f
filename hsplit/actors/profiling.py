"""Measurements in an actor: where the time of a call goes, and the most bytes allocated (METHOD 4).

On CUDA the bytes are the caching allocator's own counters. On a CPU they are the events that PyTorch's allocator
reports to its profiler: every block with its address, when it is given out and when it is freed. Nothing is shared with
the code that predicts memory.

Not seen on a CPU: memory that does not come from PyTorch's allocator (Python objects, tokens, workspaces inside a
kernel), and allocations of threads other than the caller's. A backward pass on a CPU runs on the caller's.
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
    """Seconds of the wall by phase, from when it is made.

    A phase ends when its work is done: on CUDA, which works behind the caller's back, that is waited for.

    Args:
        device: where the work is done.

    Attributes:
        seconds: by phase, see :data:`hsplit.observe.tables.PHASES`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside towards phase ``name``."""
        begun = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._add(name, time.perf_counter() - begun)

    def pace(self, seconds: float | None) -> None:
        """Sleep until ``seconds`` have passed since the start (``clock: emulated``, METHOD 8); ``None``: do not.

        Whoever is more than 5 % late has no phase ``paced``.
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


# The profiler's library announces every start and stop on stderr; it reads its log level when it is first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Rounds that are looked at.
_FIRST_ROUNDS = 3
_EVERY = 10

_Method = TypeVar("_Method", bound=Callable[..., Any])


class PeakMemory:
    """Most bytes allocated above the start.

    A holder's method calls are separate windows, and a profiler runs only inside them. Blocks are followed by address,
    so that what one window leaves allocated is there when the next begins. Tensors that cross a window's border, as
    arguments or as results, are watched by weak references: they count from when the holder has them until they are
    gone, whoever lets them go. Arrays among the arguments count while the call works on them.

    Between windows a holder may allocate what it frees again; what stays of such a call is not seen.

    Args:
        device: where the holder computes. On CUDA the counters are the process's, one holder a process; those of
            several GPUs are added up, though their peaks need not fall together.
        enabled: without it nothing is measured and :meth:`peak_bytes` is 0.
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
        # Rounds begun since the holder's part last changed.
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
        """Most bytes above the start since the last call; the peak then begins anew at the bytes held now.

        0 on a CPU in a round that is not looked at.
        """
        if self._cuda:
            most = sum(map(torch.cuda.max_memory_allocated, self._gpus)) - self._start
            self._reset_gpus()
            return most
        self._forget_expired()
        most, self._peak = self._peak, self._now
        return most if self.looks else 0

    @contextmanager
    def window(self, *received: Any) -> Iterator[Callable[[Any], None]]:
        """Measure what happens inside. A window inside another is part of it.

        Args:
            received: arguments; the tensors and arrays in them are the holder's while it works on them.

        Yields:
            A function to be told what the window returns, which outlives it as long as somebody keeps it.
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
    def looks(self) -> bool:
        """Whether this round is looked at: the first three with a part, which differ, and then each tenth.

        A profiler slows down what it watches, by so much an operation: small models most of all.
        """
        return self._cuda or self._round <= _FIRST_ROUNDS or self._round % _EVERY == 0

    def begin_part(self) -> None:
        """The holder has another part of the model, or another state: its rounds are new ones."""
        self._round = 0
        self._begin()

    def begin_round(self) -> None:
        """What is measured only once or twice in a round is measured again."""
        self._round += 1
        self._begin()

    def _begin(self) -> None:
        self._steps.clear()
        self._measured.clear()

    def selects_step(self, step: int) -> bool:
        """Whether ``step`` is one of the first two since :meth:`begin_round`, in a round that is looked at.

        The first one makes the optimizer's moments, the second is the first to run beside them; later ones free what
        they allocate.
        """
        if step not in self._steps and len(self._steps) < 2:
            self._steps.add(step)
        return self.looks and step in self._steps

    def selects_call(self, method: str) -> bool:
        """Whether this is the first call of ``method`` since :meth:`begin_round`, in a round that is looked at."""
        first = method not in self._measured
        self._measured.add(method)
        return self.looks and first

    def _reset_gpus(self) -> None:
        for gpu in self._gpus:
            torch.cuda.reset_peak_memory_stats(gpu)

    def _receive(self, received: Any) -> int:
        """Take over the tensors that the caller gave; returns the bytes of the arrays beside them."""
        for storage in _storages(_leaves(received, Tensor)):
            address = storage.data_ptr()
            if address not in self._live:
                self._follow(address, storage.nbytes())
                self._watched[address] = StorageWeakRef(storage)
        # An array over a tensor's memory that is in the account already does not count twice.
        arrays = {array.ctypes.data: array.nbytes for array in _leaves(received, np.ndarray)}
        return sum(size for address, size in arrays.items() if address not in self._live)

    def _follow(self, address: int, size: int) -> None:
        """``size`` bytes were given out at ``address``, or the block there was freed (``size <= 0``)."""
        self._watched.pop(address, None)
        # An address that is given out a second time was freed where nobody looked.
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

    @functools.wraps(method)
    def call(holder: Any, *arguments: Any) -> Any:
        holder._memory.begin_part()
        return _windowed(method, holder, arguments)

    return cast(_Method, call)


def measured_with_round(method: _Method) -> _Method:
    """Measure every call of a holder's ``method`` that begins a round: what it leaves allocated must be followed."""

    @functools.wraps(method)
    def call(holder: Any, *arguments: Any) -> Any:
        holder._memory.begin_round()
        return _windowed(method, holder, arguments)

    return cast(_Method, call)


def measured_always(method: _Method) -> _Method:
    """Measure every call of a holder's ``method``, which may leave something allocated that must be followed."""

    @functools.wraps(method)
    def call(holder: Any, *arguments: Any) -> Any:
        return _windowed(method, holder, arguments)

    return cast(_Method, call)


def measured(method: _Method) -> _Method:
    """Measure every call of a holder's ``method``, which leaves nothing allocated, in the rounds that are looked at."""

    @functools.wraps(method)
    def call(holder: Any, *arguments: Any) -> Any:
        return _windowed(method, holder, arguments) if holder._memory.looks else method(holder, *arguments)

    return cast(_Method, call)


def measured_in_first_steps(method: _Method) -> _Method:
    """Measure a holder's ``method(step, ...)`` in the first two local steps of a round that is looked at."""

    @functools.wraps(method)
    def call(holder: Any, step: int, *arguments: Any) -> Any:
        if holder._memory.selects_step(step):
            return _windowed(method, holder, (step, *arguments))
        return method(holder, step, *arguments)

    return cast(_Method, call)


def measured_once_a_round(method: _Method) -> _Method:
    """Measure the first call of a holder's ``method`` in a round that is looked at: a validation's first batch."""

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
    """Have the matrix products' library take what it keeps for itself, which is the runtime's and no holder's.

    On an H100 that is 32 MiB for each thread that multiplies: this one, and autograd's.
    """
    weight = torch.ones(16, 16, device=gpu, requires_grad=True)
    (weight @ weight).sum().backward()


def _blocks(profiler: Any) -> list[tuple[int, int]]:
    """Address and size of every block given out, and freed with its size below 0, in the order of time."""
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
    """The tensors whose memory the arrays in ``values`` show."""
    return [owner for array in _leaves(values, np.ndarray) if isinstance(owner := _owner(array), Tensor)]


def _owner(array: Any) -> Any:
    while isinstance(array, np.ndarray):
        array = array.base
    return array


def _leaves(value: Any, kind: type) -> list[Any]:
    """Everything of ``kind`` inside sequences, mappings and dataclasses."""
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
