"""Several processes on one run: each takes a share of every batch, and all keep the same masks.

1. Every process holds the model and draws the same gates (from the seed and the step, on the CPU).
2. A batch's pairs are dealt out. A process weighs its mean loss by its share of the pairs, so the
   gradients of log alpha add up to that of the whole batch: one sum of n_edges numbers a step.
3. The first process's log alphas are handed to all after each step, so that rounding on unlike
   devices cannot part them. It alone writes checkpoints and shows progress.
4. A process that dies or hangs leaves the others waiting in that sum. They end with LostProcess,
   and the first, if it lives, writes the state of the last whole step before.

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
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> Ranks:
        """Those of the process group, or one process alone where there is none."""
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
        for parameter, part in zip(
            parameters, flat[:-1].split([g.numel() for g in gradients]), strict=True
        ):
            parameter.grad = part.view_as(parameter).to(parameter).clone()
        return float(flat[-1])

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by the first process's, on the first tensor's device: a backend of GPUs
        takes no others. Raises LostProcess.
        """
        if self.size == 1:
            return
        given = [tensor.detach() for tensor in tensors]
        for tensor in given:
            there = tensor.to(given[0].device)
            self._together(dist.broadcast, there, src=0)
            if there is not tensor:
                tensor.copy_(there)

    def check_same(self, digest: str, device: torch.device) -> None:
        """Raise ValueError unless every process gives the same hexadecimal digits."""
        if self.size == 1:
            return
        mine = torch.tensor([int(digest[:15], 16)], device=device)
        all_of_them = [torch.empty_like(mine) for _ in range(self.size)]
        self._together(dist.all_gather, all_of_them, mine)
        other = [rank for rank, theirs in enumerate(all_of_them) if not theirs.equal(mine)]
        if other:
            raise ValueError(
                f"process {self.rank} of {self.size} has other settings, pairs, graph or steps "
                f"done than process {other[0]}: start all with the same arguments and checkpoint."
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
    """The process group of torchrun, for as long as the context lasts, and this process's GPU.

    Without torchrun it is one process alone.

    Args:
        timeout: seconds after which a process that does not answer counts as lost.
        backend: "nccl" where there are GPUs, else "gloo".

    Raises ValueError where a node has fewer GPUs than processes.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield Ranks.current()
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this node, but it has {torch.cuda.device_count()} GPUs: start "
                "at most one process a GPU (--nproc-per-node)."
            )
        torch.cuda.set_device(local)
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield Ranks.current()
    finally:
        dist.destroy_process_group()
