"""What an actor's process sees of GPUs, and when it looks; no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hsplit.actors.executor import failure_of
from hsplit.cluster.connection import WORKER_ENVIRONMENT
from hsplit.cluster.fork_server import NO_GPU
from hsplit.cluster.ray_executor import ActorShell

# Prints the modules that look for GPUs when they are imported.
WATCH = """
import importlib, sys, torch
looked = 0
def look(*arguments, **named):
    global looked
    looked += 1
    return False
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = look
for module in sys.argv[1:]:
    before = looked
    importlib.import_module(module)
    if looked > before:
        print(module)
"""


def test_nothing_looks_for_gpus_before_ray_has_chosen_an_actors() -> None:
    """CUDA keeps to what it sees at its first use, and Ray chooses when an actor begins, in a worker that is there."""
    preloaded = WORKER_ENVIRONMENT["RAY_preload_python_modules"].split(",")
    # What an actor's class and its arguments bring with them.
    sent = ["hsplit.cluster.ray_executor", "hsplit.actors.factory"]
    command = [sys.executable, "-c", WATCH, *preloaded, *sent, "bitsandbytes"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["bitsandbytes"]


@pytest.mark.parametrize("gpu", [False, True])
def test_an_actor_without_a_share_of_a_gpu_sees_none(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NO_GPU:
        monkeypatch.setenv(name, "3")
    seen: list[str] = []
    ActorShell("a", lambda: seen.extend(os.environ[name] for name in NO_GPU), 1, gpu=gpu)
    assert seen == ["3" if gpu else ""] * len(NO_GPU)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA",
        "CUDA out of memory. Tried to allocate 20.00 MiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_a_gpu_without_memory_is_a_holder_that_ran_out_of_it(text: str) -> None:
    assert failure_of("a", "forward", RuntimeError(text)).kind == "memory"
    assert failure_of("a", "forward", RuntimeError("CUDA error: an illegal memory access")).kind == "error"
