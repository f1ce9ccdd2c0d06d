"""How many edges runs with different seeds share, and how good the shared edges are.

    python benchmarks/settings.py --seeds 0 1 2 3 4 --variants default --steps 150
    python benchmarks/overlap.py runs/settings-ioi-t1/default-?-150.safetensors

Reads the runs' scores and trains nothing. Prints three tables as Markdown: the pairwise overlap
(IoU) of the runs' circuits at every size; at --n-edges, the held-out KL of the edges that several
runs share, and of the same number of each run's highest edges; and the KL of the mean of the runs'
rankings, and of each run. The 64 held-out pairs are those of settings.py.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from settings import HELD_OUT, MOST_PAIRS, SIZES

from tl_edgeprune import Circuit, EdgeScores, Task, models, tasks
from tl_edgeprune.evaluation.evaluate import evaluate_all
from tl_edgeprune.evaluation.stability import Stability


def main() -> None:
    options = parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    runs = [EdgeScores.load(path) for path in options.scores]
    if len(runs) < 2:
        raise SystemExit("one run has nothing to be compared with: give two or more files.")
    model = models.load("smollm2-135m")
    held = tasks.load(options.task, model, HELD_OUT + MOST_PAIRS, 0)[:HELD_OUT]
    print(f"{len(runs)} runs, {HELD_OUT} pairs of {options.task} held out\n")
    print(overlaps(runs), flush=True)
    print(shared(model, held, runs, options.n_edges), flush=True)
    print(mean_ranking(model, held, runs))


def overlaps(runs: Sequence[EdgeScores]) -> str:
    rows = []
    for size in SIZES:
        circuits = [run.top(size) for run in runs]
        each = [a.iou(b) for a, b in itertools.combinations(circuits, 2)]
        rows.append((size, *three(each)))
    return table(("edges", "IoU, min", "mean", "max"), rows)


def shared(model: Any, held: Task, runs: Sequence[EdgeScores], n_edges: int) -> str:
    circuits = tuple(run.top(n_edges) for run in runs)
    found = Stability(circuits, tuple((seed, None) for seed in range(len(runs))))
    rows = []
    for n in range(len(runs), 1, -1):
        core = found.core(n / len(runs))
        if core.n_edges:
            kl, *own = kls(model, held, [core, *(run.top(core.n_edges) for run in runs)])
            rows.append((f"{n} of {len(runs)}", core.n_edges, f"{kl:.2f}", *three(own)))
    heads = ("kept by", "edges", "KL", "KL of as many top edges of one run, min", "mean", "max")
    return table(heads, rows)


def mean_ranking(model: Any, held: Task, runs: Sequence[EdgeScores]) -> str:
    mean = torch.stack([run.tensor for run in runs]).mean(0)
    joint = EdgeScores(runs[0].graph, mean, dict(runs[0].metadata), by_magnitude=False)
    rows = []
    for size in SIZES:
        kl, *own = kls(model, held, [scores.top(size) for scores in (joint, *runs)])
        rows.append((size, f"{kl:.2f}", *three(own)))
    return table(("edges", "KL of the mean ranking", "KL of one run, min", "mean", "max"), rows)


def kls(model: Any, held: Task, circuits: Sequence[Circuit]) -> list[float]:
    return [found.kl for found in evaluate_all(model, circuits, held)]


def three(values: Sequence[float]) -> tuple[str, str, str]:
    """Minimum, mean and maximum."""
    found = (min(values), sum(values) / len(values), max(values))
    least, mean, most = (f"{value:.2f}" for value in found)
    return least, mean, most


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("scores", nargs="+", type=Path, help="scores files of settings.py")
    found.add_argument("--task", default="ioi-t1", choices=["ioi-t1", "ioi"])
    found.add_argument("--n-edges", type=int, default=1000)
    found.add_argument("--threads", type=int, default=None, help="default: torch's")
    return found


if __name__ == "__main__":
    main()
