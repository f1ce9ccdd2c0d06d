"""Several processes on one run: each takes a share of every batch, and all keep the same masks.

1. Every process holds the model and draws the same gates (from the seed and the step, on the CPU).
2. The pairs of a batch are divided among the processes. Each weights its mean loss by its share of
   the pairs, so the gradients of log alpha sum to that of the whole batch: one all-reduce of
   n_edges numbers per step.
3. The first process broadcasts its log alphas after each step, so that rounding on different
   devices cannot make them diverge. Only this process writes checkpoints and shows progress.
4. A process that dies or hangs leaves the others waiting in the all-reduce. They end with
   LostProcess, and the first, if it is alive, first writes the state of the last whole step.

torchrun --nproc-per-node 4 run.py, where run.py does its work inside `with started():`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = 300.0  # seconds


class LostProcess(RuntimeError):
    """Another process of the run has ended, or does not answer in time."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank among the `size` processes of a run."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> Ranks:
        """Those of the process group; rank 0 of 1 without one."""
        if not (dist.is_available() and dist.is_initialized()):
            return Ranks()
        return Ranks(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def most_rows(self, n: int) -> int:
        """The largest number of a batch's `n` pairs that one process receives."""
        return -(-n // self.size)

    def rows(self, n: int) -> tuple[list[int], float]:
        """Which of a batch's `n` pairs this process runs, and their share of the batch.

        With fewer pairs than processes some run the first pair with share 0, since all processes
        must run the same number of forwards.
        """
        rows = list(range(self.rank, n, self.size))
        return rows or [0], len(rows) / n

    def rows_of_all(self, n: int) -> list[list[int]]:
        """The rows of each process that receives any."""
        return [Ranks(rank, self.size).rows(n)[0] for rank in range(min(self.size, n))]

    def all_reduce(self, parameters: Sequence[Tensor], loss: float) -> float:
        """Sum the parameters' gradients over all processes, in place; returns the summed loss.

        Raises LostProcess.
        """
        if self.size == 1:
            return loss
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        device = parameters[0].device
        flat = torch.cat([g.flatten().to(device) for g in gradients])
        flat = torch.cat([flat, flat.new_tensor([loss])])
        self._together(dist.all_reduce, flat)
        sums = flat[:-1].split([g.numel() for g in gradients])
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total.view_as(parameter).to(parameter).clone()
        return float(flat[-1])

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the first process. Raises LostProcess.

        They are sent from the first tensor's device, since a GPU backend takes no CPU tensors.
        """
        if self.size == 1:
            return
        detached = [tensor.detach() for tensor in tensors]
        for tensor in detached:
            sent = tensor.to(detached[0].device)
            self._together(dist.broadcast, sent, src=0)
            if sent is not tensor:
                tensor.copy_(sent)

    def check_same(self, digest: str, device: torch.device) -> None:
        """Raise ValueError unless every process gives the same hexadecimal digits."""
        if self.size == 1:
            return
        number = torch.tensor([int(digest[:15], 16)], device=device)
        numbers = [torch.empty_like(number) for _ in range(self.size)]
        self._together(dist.all_gather, numbers, number)
        different = [rank for rank, other in enumerate(numbers) if not other.equal(number)]
        if different:
            raise ValueError(
                f"process {self.rank} of {self.size} has different settings, pairs, graph or steps "
                f"done than process {different[0]}: start all with the same arguments and "
                "checkpoint."
            )

    def _together(self, collective: Any, *arguments: Any, **options: Any) -> None:
        try:
            collective(*arguments, **options)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise LostProcess(
                f"process {self.rank} of {self.size}: another process has ended or does not answer "
                f"({reason})."
            ) from error


@contextmanager
def started(timeout: float = TIMEOUT, backend: str | None = None) -> Iterator[Ranks]:
    """Joins the process group of torchrun while the context lasts, and selects this process's GPU.

    Without torchrun the run has one process.

    Args:
        timeout: seconds after which a process that does not answer counts as lost.
        backend: by default "nccl" if there are GPUs, else "gloo".

    Raises ValueError if a node has fewer GPUs than processes.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield Ranks.current()
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this node, but it has {torch.cuda.device_count()} GPUs: start "
                "at most one process per GPU (--nproc-per-node)."
            )
        torch.cuda.set_device(local)
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield Ranks.current()
    finally:
        dist.destroy_process_group()
