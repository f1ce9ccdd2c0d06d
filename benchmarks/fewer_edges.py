"""With how many edges Edge Pruning is as faithful as a circuit of ACDC, on pairs that neither saw.

    python benchmarks/settings.py --variants pairs-1024 --steps 500 --n-edges 125
    python benchmarks/fewer_edges.py runs/settings-ioi-t1/pairs-1024-0-500.safetensors \\
        [--thresholds 0.01 0.003 0.001] [--pairs 8] [--out runs/fewer-edges]

ACDC by groups (search="bisect") on SmolLM2-135M, the KL its objective, at each threshold; then the
fewest of the scores' highest edges whose held-out KL is no higher. ACDC's pairs are of those that
the scores were trained on; the 64 held out are those of settings.py. ACDC's circuits are kept in
--out, and searches that were stopped go on; the table is printed as Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from settings import HELD_OUT, MOST_PAIRS

from tl_edgeprune import Circuit, EdgeScores, Task, models, tasks
from tl_edgeprune.evaluate import evaluate, evaluate_all
from tl_edgeprune.methods.acdc import acdc

AT_ONCE = 8  # circuits of one search step: each step looks at so many sizes


def searched(model: Any, train: Task, threshold: float, out: Path) -> Circuit:
    """ACDC's circuit, taken from its file where it is there."""
    path = out / f"acdc-{train.name}-{len(train)}-{threshold:g}.json"
    if path.exists():
        return Circuit.load(path)
    state = path.with_suffix(".state.json")
    circuit = acdc(model, train, threshold=threshold, search="bisect", checkpoint=state)
    circuit.save(path)
    return circuit


def fewest(model: Any, held: Task, scores: EdgeScores, most: float, low: int, high: int) -> int:
    """The fewest edges in (low, high] that have a KL of at most `most`, by narrowing down.

    More edges may be worse by chance; the sizes that are looked at get closer to the first that
    serves. `high` is returned unseen: the caller knows that it serves, or takes it as the end.
    """
    while high - low > 1:
        count = min(AT_ONCE, high - low - 1)
        sizes = [low + (high - low) * (step + 1) // (count + 1) for step in range(count)]
        found = evaluate_all(model, [scores.top(size) for size in sizes], held)
        serving = [size for size, each in zip(sizes, found, strict=True) if each.kl <= most]
        if not serving:
            low = sizes[-1]
            continue
        high = serving[0]
        low = max([low, *(size for size in sizes if size < high)])
    return high


def main() -> None:
    options = parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    scores = EdgeScores.load(options.scores)
    model = models.load("smollm2-135m")
    pairs = tasks.load(options.task, model, HELD_OUT + MOST_PAIRS, 0)
    held, train = pairs[:HELD_OUT], pairs[HELD_OUT:][: options.pairs]
    options.out.mkdir(parents=True, exist_ok=True)
    print("| ACDC's threshold | its edges | its runs | KL | Edge Pruning's edges | ratio |")
    print("|---|---|---|---|---|---|")
    for threshold in options.thresholds:
        circuit = searched(model, train, threshold, options.out)
        kl = evaluate(model, circuit, held).kl
        n_edges = fewest(model, held, scores, kl, 0, scores.graph.n_edges)
        row = (f"{threshold:g}", circuit.n_edges, circuit.metadata["runs"], f"{kl:.2f}", n_edges)
        print("|", " | ".join(map(str, row)), f"| {circuit.n_edges / n_edges:.2f} |", flush=True)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("scores", type=Path, help="a file of settings.py")
    found.add_argument("--task", default="ioi-t1", choices=["ioi-t1", "ioi"])
    found.add_argument("--thresholds", nargs="+", type=float, default=[0.01, 0.003, 0.001])
    found.add_argument("--pairs", type=int, default=8, help="that ACDC looks at (default: 8)")
    found.add_argument("--out", type=Path, default=Path("runs/fewer-edges"))
    found.add_argument("--threads", type=int, default=None, help="default: torch's")
    return found


if __name__ == "__main__":
    main()
