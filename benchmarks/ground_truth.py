"""Every method against known circuits, in compiled programs and semi-synthetic models.

    python benchmarks/ground_truth.py [--only siit-sum …] [--methods eap …] [--seeds 3]

For each model and method: the area under the ROC curve over edges and over nodes, the share of the
known circuit's edges among the same number of top edges, and seconds. All use counterfactual
ablation, 64 pairs, and the method's defaults except for batches of 16. Pairs, gates and random
scores are drawn from each seed, and results are means over the seeds. ACDC gives a circuit per
threshold: an edge's score is the highest threshold that keeps it.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from tl_edgeprune import Circuit, EdgeGraph, EdgeScores, Task, discover, models, roc, tasks
from tl_edgeprune.methods.registry import METHODS
from tl_edgeprune.models import semi_synthetic, tracr

RESULTS = Path(__file__).parent / "results" / "ground-truth"
PAIRS = 64
RANDOM = 100  # repeats of random scores
THRESHOLDS = torch.logspace(-6, 1, 15).tolist()  # in nats
FIELDS = ("model", "method", "edge_auc", "node_auc", "found", "seconds", "seeds")


def scores_of(model: Any, task: Task, method: str, seed: int) -> EdgeScores:
    given = {"batch_size": 16, "seed": seed, "progress": False}
    own = {name: value for name, value in given.items() if name in METHODS[method].parameters}
    if method == "acdc":
        return by_threshold(model, task, own)
    return discover(model, task, method=method, **own)


def by_threshold(model: Any, task: Task, settings: dict[str, Any]) -> EdgeScores:
    """The number, from 1, of the last threshold that keeps each edge; 0 if none does."""
    graph = EdgeGraph.from_model(model)
    scores = torch.zeros(graph.n_edges)
    for place, threshold in enumerate(THRESHOLDS, start=1):
        circuit = discover(model, task, method="acdc", threshold=threshold, **settings)
        scores[circuit.mask] = float(place)
    return EdgeScores(graph, scores, {"method": "acdc"})


def figures(model: Any, name: str, method: str, seed: int) -> dict[str, float]:
    task = tasks.load(name, model, PAIRS, seed)
    edges = models.known_circuit(name, "counterfactual")
    started = time.process_time()
    scores = scores_of(model, task, method, seed)
    seconds = time.process_time() - started
    known = Circuit.from_edges(scores.graph, edges)
    absolute = scores.by_magnitude
    top = scores.top(len(edges))
    return {
        "edge_auc": roc(scores, known, absolute=absolute).auc,
        "node_auc": roc(scores, known, level="node", absolute=absolute).auc
        if len(known.nodes) < known.graph.n_sources
        else math.nan,
        "found": (top & known).n_edges / len(edges),
        "seconds": seconds,
    }


def rows(name: str, methods: list[str], seeds: int) -> list[dict[str, Any]]:
    model = models.load(name, device="cpu")
    found = []
    for method in methods:
        repeats = RANDOM if method == "random" else seeds
        each = [figures(model, name, method, seed) for seed in range(repeats)]
        row = {field: mean(one[field] for one in each) for field in FIELDS[2:6]}
        found.append({"model": name, "method": method} | row | {"seeds": repeats})
        print(row_text(found[-1]), flush=True)
    return found


def row_text(row: dict[str, Any]) -> str:
    numbers = "".join(f"{row[field]:>10.3f}" for field in FIELDS[2:6])
    return f"{row['model']:<22}{row['method']:<22}{numbers}{row['seeds']:>4}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = (*semi_synthetic.NAMES, *tracr.NAMES)
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="models")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{'model':<22}{'method':<22}" + "".join(f"{f:>10}" for f in FIELDS[2:6]) + "   n")
    for name in args.only:
        with (args.out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            for row in rows(name, args.methods, args.seeds):
                writer.writerow(
                    {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()}
                )


if __name__ == "__main__":
    main()
