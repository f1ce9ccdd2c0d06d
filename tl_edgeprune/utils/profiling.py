"""Memory and time of a piece of code, in two ways.

- `LiveBytes` counts the bytes of live tensors operation by operation, for tests and plans. It is
  exact, gives the same on every machine and ignores what an allocator keeps. It does not see memory
  that an operation takes and frees inside itself.
- `measured` gives the wall time of a block and its peak memory above the start, as the GPU's
  allocator or the operating system reports it: what a user's machine needs.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are created inside it: `peak`, and `now`."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def now(self) -> int:
        self._sizes = {k: v for k, v in self._sizes.items() if not v[0].expired()}
        return sum(size for _, size in self._sizes.values())

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        input_storages = {s._cdata for s in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in input_storages:
                self._sizes[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


INTERVAL = 0.01  # seconds between two samples


@dataclass
class Cost:
    """seconds: wall time; peak_mb: in 10^6 bytes, None if the system does not report it."""

    seconds: float = 0.0
    peak_mb: float | None = None


@contextmanager
def measure_cost(device: torch.device | str = "cpu") -> Iterator[Cost]:
    """The cost of the block on this device; its fields are set when the block ends."""
    cost = Cost()
    _return_free_memory()
    memory = _Allocated(device) if torch.device(device).type == "cuda" else _Resident()
    started = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - started
        peak = memory.stop()
        cost.peak_mb = None if peak is None else max(0, peak) / 1e6


class _Allocated:
    """Peak of torch's memory on a GPU, in bytes above the start."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    def stop(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.before


class _Resident:
    """Peak of the process's resident size, in bytes above the start.

    Without psutil, it is the rise of the peak that the system records for the process: 0 if an
    earlier peak was higher, None on systems that record none.
    """

    def __init__(self) -> None:
        self.process = _process()
        self.before = self.peak = self._now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        if self.process is not None:
            self.thread.start()

    def stop(self) -> int | None:
        self.done.set()
        if self.process is not None:
            self.thread.join()
        now = self._now()
        if self.before is None or self.peak is None or now is None:
            return None
        return max(self.peak, now) - self.before

    def _watch(self) -> None:
        while not self.done.wait(INTERVAL):
            self.peak = max(self.peak or 0, self._now() or 0)

    def _now(self) -> int | None:
        return self.process.memory_info().rss if self.process is not None else _recorded_peak()


def _process() -> Any:
    try:
        import psutil
    except ImportError:
        return None
    return psutil.Process()


def _recorded_peak() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _return_free_memory() -> None:
    """Return unused memory to the system, if the C library can."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
        if trim is not None:
            trim(0)
