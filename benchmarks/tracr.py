"""Edge Pruning against circuits that are known: two compiled programs, two ablations, five seeds.

    python benchmarks/tracr.py [--seeds 5]

Tells how many seeds found exactly the known circuit, and the seconds of a run (on one thread,
scoring included). A run starts from the ranking that mask-IG gives, keeps nearly all edges at
first and takes 400 small steps: a budget that starts low would break the program on nearly every
draw, and large steps leave the ranking before the gates have told the edges apart.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from tl_edgeprune import EdgePruner, ExactBudget, PruneResult, models, tasks
from tl_edgeprune.methods.attribution import mask_ig

CASES = [
    (name, ablation)
    for ablation in ("zero", "counterfactual")
    for name in ("tracr-xproportion", "tracr-reverse")
]
PAIRS = 60  # 3, 9, 16, 16 and 16 pairs of one to five tokens: every length in one batch


def prune(model: Any, name: str, ablation: str, seed: int) -> PruneResult:
    """A circuit of the known one's size."""
    task = tasks.load(name, model, PAIRS, seed)
    pruner = EdgePruner(
        len(models.known_circuit(name, ablation)),
        ablation=ablation,
        steps=400,
        lr=0.05,
        batch_size=16,
        controller=ExactBudget(start_share=0.9, anneal=0.8),
        hard_share=0.2,
        init_scores=mask_ig(model, task, ablation=ablation, batch_size=16),
        init_log_alpha=(0.0, 2.0),
        seed=seed,
        progress=False,
    )
    return pruner.fit(model, task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    print(f"{'program':<20}{'ablation':<16}{'edges':>12}{'recovered':>12}{'s a run':>10}")
    for name, ablation in CASES:
        model, known = models.load(name, device="cpu"), models.known_circuit(name, ablation)
        exact, started = 0, time.perf_counter()
        for seed in range(seeds):
            result = prune(model, name, ablation, seed)
            exact += set(result.circuit.edges) == known
        seconds = (time.perf_counter() - started) / seeds
        size = f"{len(known)} of {result.graph.n_edges}"
        print(
            f"{name:<20}{ablation:<16}{size:>12}{f'{exact} of {seeds}':>12}{seconds:>10.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
