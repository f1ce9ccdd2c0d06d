"""ACDC's cost per edge, relative to a plain forward and backward.

    python benchmarks/acdc_cost.py [--kinds bridge hooked] [--shares 1 0.1] [--every 3]

GPT-2 small's shape with random weights, 8 prompts of 16 tokens read at the last position, float32,
one thread. A read's cost is that of deciding one of its edges: candidates are batched in ACDC's
order, on a mask that keeps all earlier edges and `share` of the edges of later reads. With a share
of 1 nothing was removed yet: the maximum cost per edge, and the cost of exact patching. The mean
weights reads by their number of edges; with --every 3 only every third read is timed. Medians.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from step_cost import BATCH, KINDS, POS, available, load, plain_step, prompts, seconds

from tl_edgeprune import Task
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.objectives import OBJECTIVES
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.search.cuts import find_cuts
from tl_edgeprune.search.full_cuts import FullCuts


def late_mask(cuts: FullCuts, place: int, share: float) -> torch.Tensor:
    """All edges up to this read, and `share` of the later ones."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(cuts.graph.n_edges, generator=generator) < share
    mask[: cuts.graph.reads[place].edges.stop] = True
    return mask


def edge_seconds(cuts: FullCuts, place: int, repeats: int) -> float:
    """Seconds per candidate, for nested sets of the latest edges into a destination."""
    read, count = cuts.graph.reads[place], cuts.candidates(place)
    nested = torch.zeros(count, read.n_destinations, read.n_sources, dtype=torch.bool)
    for candidate in range(count):
        nested[candidate, read.n_destinations // 2, -1 - candidate :] = True
    times = [seconds(lambda: cuts.losses(place, nested)) for _ in range(repeats + 1)]
    return statistics.median(times[1:]) / count


def measure(kind: str, shares: list[float], repeats: int, every: int) -> None:
    model, (clean, corrupted) = load(kind, 12), prompts()
    plain = statistics.median([seconds(lambda: plain_step(model, clean)) for _ in range(7)][1:])
    print(f"{kind}: plain forward and backward {plain:.3f} s")
    task = Task("random", list(clean), list(corrupted), [torch.tensor([POS - 1])] * BATCH)
    with MaskedModel.attach(model) as run:
        targets = Targets(run, task, max_bytes=0)
        cuts = find_cuts(run, targets, OBJECTIVES["kl"], batch_size=BATCH)
        for share in shares:
            print(f"  {type(cuts).__name__}, {100 * share:g} % of later edges kept")
            print("    read             edges  candidates  x plain")
            total = edges = 0.0
            for place in reversed(range(0, len(run.graph.reads), every)):
                read = run.graph.reads[place]
                cuts.set(late_mask(cuts, place, share))
                each = edge_seconds(cuts, place, repeats) / plain
                n_edges = read.n_destinations * read.n_sources
                total, edges = total + each * n_edges, edges + n_edges
                name = f"{read.kind} {read.layer}"
                print(f"    {name:14}{n_edges:8}{cuts.candidates(place):12}{each:9.3f}", flush=True)
            print(f"    mean over edges {total / edges:.3f} x plain", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=None, choices=list(KINDS))
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in options.kinds or available():
        measure(kind, options.shares, options.repeats, options.every)


if __name__ == "__main__":
    main()
