"""What the processes of test_distributed.py do, and how they are started.

They are forked from a server that has imported everything, and meet over a file.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support import model_zoo
from tl_edgeprune import EdgePruner, ExactBudget, Lagrangian, discover, evaluate
from tl_edgeprune.distributed import LostProcess, Ranks
from tl_edgeprune.hooks.shards import SHARDED_MODELS, is_sharded
from tl_edgeprune.objectives import kl
from tl_edgeprune.runs import resume as saved_state
from tl_edgeprune.sharding import sharded

MODEL = "bridge-gpt2"
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "uneven": {"batch_size": 3},
    "more-processes-than-pairs": {"batch_size": 1},
    "accumulated": {"accumulate": 2, "init_scores": None},
    "nodes-lagrangian": {
        "controller": Lagrangian(),
        "node_masks": True,
        "node_controller": Lagrangian(target_sparsity=0.3),
        "init_scores": None,
    },
    "sampled": {"controller": ExactBudget("sampled"), "n_edges": None},
}
STEPS, DIES_AT = 6, 4


def pruner(**changes: Any) -> EdgePruner:
    settings = {"n_edges": 20, "steps": STEPS, "batch_size": 4, "progress": False} | changes
    return EdgePruner(**settings)


def model_and_task() -> tuple[Any, Any]:
    model = model_zoo.build(MODEL, torch.float64)
    return model, model_zoo.pairs(model)


class Until:
    """The KL, until the step at which process 1 does something else."""

    __name__ = "kl"

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act, self.calls = act, 0

    def __call__(self, logits: Any, full: Any, batch: Any) -> Any:
        self.calls += 1
        if self.calls > DIES_AT and dist.get_rank() == 1:
            self.act()
        return kl(logits, full, batch)


# --------------------------------------------------------------------------------------- the jobs


def fits(rank: int, folder: Path) -> None:
    model, task = model_and_task()
    for name, settings in SETTINGS.items():
        result = pruner(**settings).fit(model, task)
        losses = torch.tensor([entry["loss"] for entry in result.history], dtype=torch.float64)
        torch.save((result.log_alpha, losses), folder / f"{name}-{rank}")


ARCHITECTURES = [
    name
    for name in model_zoo.ARCHITECTURES
    if name.split("-", 1)[1] in ("gpt2", "pythia", "llama-gqa", "gemma2", "attn-only")
]


def shards(rank: int, folder: Path) -> None:
    for name in ARCHITECTURES:
        model = model_zoo.build(name, torch.float64)
        task = model_zoo.pairs(model)
        whole = [p.clone() for p in model.parameters()]
        with sharded(model):
            parts = SHARDED_MODELS[model]
            result = pruner(checkpoint=folder / f"state-{name}").fit(model, task)
            last = len(model.blocks) - 1
            left = sum(
                p.untyped_storage().nbytes()
                for b in parts.blocks[:last]
                for p in [part.parameter.data for part in b]
            )
            most = parts.most_whole
            inside = evaluate(model, result.circuit, task)
            twice = nested(model)
            again = pruner(steps=2, recompute=True).fit(model, task)
            by_turns = parts.whole == set()
            dist.barrier()  # the first process has written its checkpoint
            resumed = pruner(checkpoint=folder / f"state-{name}").fit(
                model, task, resume=folder / f"state-{name}"
            )
            assert resumed.log_alpha.equal(result.log_alpha)
            if name == MODEL:
                assert searched(model, task, folder / "search")
                assert parts.most_whole <= 2  # also where parts of blocks are run alone
        same = same_bits(model, whole) and after_an_exception(model, whole)
        alone = torch.tensor([left, most, int(same), int(twice), int(by_turns)])
        figures = torch.tensor([inside.kl, inside.logit_diff], dtype=torch.float64)
        found = result.log_alpha, again.log_alpha
        torch.save((*found, alone, figures), folder / f"{name}-{rank}")


def same_bits(model: Any, whole: list[torch.Tensor]) -> bool:
    return all(p.equal(q) for p, q in zip(model.parameters(), whole, strict=True))


def searched(model: Any, task: Any, path: Path) -> bool:
    """Whether a search that saves its state (the first process alone) goes on from it in all."""
    settings: dict[str, Any] = {"method": "acdc", "threshold": 0.5, "search": "bisect"}
    whole = discover(model, task, **settings)
    saved_state.SAVE_SECONDS = 0.0
    first = discover(model, task, **settings, checkpoint=path)
    dist.barrier()  # the first process has written it
    again = discover(model, task, **settings, checkpoint=path)
    gone_on = again.metadata["runs"] - first.metadata["runs"] < whole.metadata["runs"]
    return first == whole == again and gone_on


def nested(model: Any) -> bool:
    """Whether a second context refuses the model."""
    try:
        with sharded(model):
            return False
    except ValueError as error:
        return "the model is sharded already: leave that context first." in str(error)


def after_an_exception(model: Any, whole: list[torch.Tensor]) -> bool:
    """Whether an exception, with one block put together, leaves the weights as they were."""
    try:
        with sharded(model):
            SHARDED_MODELS[model].gather(0)
            raise InterruptedError
    except InterruptedError:
        return same_bits(model, whole) and not is_sharded(model)


def _broken(rank: int, folder: Path, act: Callable[[], Any]) -> None:
    model, task = model_and_task()
    run = pruner(
        objective=Until(act), init_scores=None, checkpoint=folder / "state", checkpoint_every=3
    )
    try:
        run.fit(model, task)
    except LostProcess as error:
        (folder / f"error-{rank}").write_text(str(error), encoding="utf-8")


def killed(rank: int, folder: Path) -> None:
    _broken(rank, folder, lambda: os._exit(1))


def stalled(rank: int, folder: Path) -> None:
    _broken(rank, folder, lambda: (time.sleep(8), os._exit(1)))


def unlike(rank: int, folder: Path) -> None:
    model, task = model_and_task()
    try:
        pruner(seed=rank, init_scores=None).fit(model, task)
    except ValueError as error:
        (folder / f"error-{rank}").write_text(str(error), encoding="utf-8")


JOBS = {job.__name__: job for job in (fits, killed, shards, stalled, unlike)}


# -------------------------------------------------------------------------------- starting them


def work(rank: int, size: int, job: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet-{job}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=4 if job == "stalled" else 60),
    )
    assert Ranks.current() == Ranks(rank, size)
    JOBS[job](rank, Path(folder))
    dist.destroy_process_group()


def start(job: str, folder: Path, size: int = 2) -> list[int | None]:
    """Run a job in so many processes; their exit codes."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the server's own is bare
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.two_processes"])
    processes = [
        context.Process(target=work, args=(rank, size, job, str(folder))) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]
