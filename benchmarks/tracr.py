"""Edge Pruning against known circuits: compiled programs, two ablations, five seeds.

    python benchmarks/tracr.py [--seeds 5]

Prints how many seeds find exactly the known circuit, and the seconds per run (on one thread,
including the warm start). `prune` starts from mask-IG's ranking, keeps nearly all edges at
first and takes 400 small steps. A budget that starts low breaks the program on nearly every draw,
and large steps leave the ranking before the gates have separated the edges. The last row has the
published settings for xproportion: no warm start, and a graph whose input is two sources.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from tl_edgeprune import (
    EdgePruner,
    ExactBudget,
    Lagrangian,
    Optimizer,
    PruneResult,
    discover,
    models,
    tasks,
)
from tl_edgeprune.models import tracr

CASES = [
    (name, ablation)
    for ablation in ("zero", "counterfactual")
    for name in tracr.NAMES
    if models.known_circuit(name, ablation)
]
PAIRS = 60  # of three tokens: 3, 9, 16, 16 and 16 pairs of one to five, each length in one batch


def prune(model: Any, name: str, ablation: str, seed: int) -> PruneResult:
    """A circuit of the known circuit's size."""
    task = tasks.load(name, model, PAIRS, seed)
    scores = discover(model, task, method="mask-ig", ablation=ablation, batch_size=16)
    pruner = EdgePruner(
        len(models.known_circuit(name, ablation)),
        ablation=ablation,
        steps=400,
        lr=0.05,
        batch_size=16,
        controller=ExactBudget(start_share=0.9, anneal=0.8),
        hard_share=0.2,
        init_scores=scores,
        init_log_alpha=(0.0, 2.0),
        seed=seed,
        progress=False,
    )
    return pruner.fit(model, task)


def prune_as_published(model: Any, name: str, ablation: str, seed: int) -> PruneResult:
    """xproportion with the published code's settings, which determine the size."""
    pruner = EdgePruner.paper(
        ablation=ablation,
        steps=720,
        lr=1.0,
        batch_size=16,
        controller=Lagrangian(target_sparsity=0.92, warmup=640 / 720),
        node_controller=Lagrangian(target_sparsity=0.4, warmup=640 / 720),
        optimizer=Optimizer((0.9, 0.999), 0.01, 1.0, warmup=96, decay=True, controller_lr=1e-4),
        seed=seed,
        progress=False,
    )
    return pruner.fit(model, tasks.load(name, model, 128, seed))


def edges_of(result: PruneResult) -> set[str]:
    """The circuit's edges, with token and position embeddings merged into one input."""
    names = (edge.replace("tok->", "input->") for edge in result.circuit.edges)
    return {name.replace("pos->", "input->") for name in names}


def row(method: str, run: Callable[..., PruneResult], name: str, ablation: str, seeds: int) -> str:
    model, known = models.load(name, device="cpu"), models.known_circuit(name, ablation)
    started = time.perf_counter()
    results = [run(model, name, ablation, seed) for seed in range(seeds)]
    seconds = (time.perf_counter() - started) / seeds
    exact = sum(edges_of(result) == known for result in results)
    size = f"{len(known)} of {results[0].graph.n_edges}"
    return (
        f"{name:<20}{ablation:<16}{method:<11}{size:>9}{f'{exact} of {seeds}':>11}{seconds:>11.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=tracr.NAMES, default=tracr.NAMES)
    args = parser.parse_args()
    seeds = args.seeds
    torch.set_num_threads(1)
    print(
        f"{'program':<20}{'ablation':<16}{'settings':<11}{'edges':>9}{'exact':>11}{'s per run':>11}"
    )
    for name, ablation in CASES:
        if name in args.only:
            print(row("ours", prune, name, ablation, seeds), flush=True)
    if "tracr-xproportion" in args.only:
        print(row("published", prune_as_published, "tracr-xproportion", "zero", seeds), flush=True)


if __name__ == "__main__":
    main()
