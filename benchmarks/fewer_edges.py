"""How many edges Edge Pruning needs to match an ACDC circuit on pairs that neither has seen.

    python benchmarks/settings.py --variants pairs-1024-judged --steps 500 --n-edges 85
    python benchmarks/fewer_edges.py runs/settings-ioi-t1/pairs-1024-judged-0-500.safetensors \\
        [--thresholds 0.01 0.003 0.001] [--pairs 8] [--start 220 --stop 50] [--out runs/fewer-edges]

Runs ACDC by groups (search="bisect") with the KL as objective on SmolLM2-135M, at each threshold.
Then finds the smallest number of top edges whose held-out KL is no higher, for the scores and after
elimination has reranked the --start highest. Ratios count only edges that are alive, since the
others do nothing. ACDC and elimination use training pairs of the scores; the 64 held-out pairs are
those of settings.py. Results are saved in --out, interrupted searches continue, and the table is
printed as Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from settings import HELD_OUT, MOST_PAIRS

from tl_edgeprune import Circuit, EdgeScores, Task, eliminate, models, tasks
from tl_edgeprune.evaluation.evaluate import evaluate, evaluate_all
from tl_edgeprune.methods.acdc import acdc

AT_ONCE = 8
ELIMINATION_PAIRS = 32


def searched(model: Any, train: Task, threshold: float, out: Path) -> Circuit:
    """ACDC's circuit, loaded from its file if it exists."""
    path = out / f"acdc-{train.name}-{len(train)}-{threshold:g}.json"
    if path.exists():
        return Circuit.load(path)
    state = path.with_suffix(".state.json")
    circuit = acdc(model, train, threshold=threshold, search="bisect", checkpoint=state)
    circuit.save(path)
    return circuit


def ranked_anew(model: Any, train: Task, scores: EdgeScores, options: Any) -> EdgeScores:
    """The scores after elimination, loaded from their file if it exists."""
    sizes = {"start": options.start, "stop": options.stop}
    path = options.out / f"{options.scores.stem}-{options.start}-{options.stop}.safetensors"
    if not path.exists():
        state = path.with_suffix(".state")
        eliminate(model, train, scores, **sizes, checkpoint=state, progress=True).save(path)
    return EdgeScores.load(path)


def fewest(model: Any, held: Task, scores: EdgeScores, most: float) -> int:
    """The fewest of the highest edges that have a KL of at most `most`: by powers of two, then
    between the last that does not serve and the first that does, `AT_ONCE` sizes at a time.

    More edges can be worse by chance: then it is the first of the sizes looked at that serves.
    """

    def narrowed(sizes: list[int], low: int, high: int) -> tuple[int, int]:
        found = zip(sizes, kls(model, held, scores, sizes), strict=True)
        high = next((size for size, kl in found if kl <= most), high)
        return max([low, *(size for size in sizes if size < high)]), high

    low, high = 0, scores.graph.n_edges
    powers = [2**power for power in range(high.bit_length()) if 2**power < high]
    for first in range(0, len(powers), AT_ONCE):
        low, high = narrowed(powers[first : first + AT_ONCE], low, high)
        if high < scores.graph.n_edges:
            break
    while high - low > 1:
        count = min(AT_ONCE, high - low - 1)
        sizes = [low + (high - low) * (step + 1) // (count + 1) for step in range(count)]
        low, high = narrowed(sizes, low, high)
    return high


def kls(model: Any, held: Task, scores: EdgeScores, sizes: list[int]) -> list[float]:
    """The KL of circuits of the highest edges, for each size."""
    return [found.kl for found in evaluate_all(model, [*map(scores.top, sizes)], held)]


def main() -> None:
    options = parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    scores = EdgeScores.load(options.scores)
    model = models.load("smollm2-135m")
    pairs = tasks.load(options.task, model, HELD_OUT + MOST_PAIRS, 0)
    held, train = pairs[:HELD_OUT], pairs[HELD_OUT:]
    options.out.mkdir(parents=True, exist_ok=True)
    anew = ranked_anew(model, train[:ELIMINATION_PAIRS], scores, options)
    print("| ACDC threshold | edges | runs | KL | ranking: edges (KL) | ratio |", end="")
    print(" after elimination | ratio |\n" + "|---" * 8 + "|")
    for threshold in options.thresholds:
        circuit = searched(model, train[: options.pairs], threshold, options.out)
        kl = evaluate(model, circuit, held).kl
        edges = alive(circuit)
        row = [f"{threshold:g}", str(edges), str(circuit.metadata["runs"]), f"{kl:.2f}"]
        for ours in (scores, anew):
            found = ours.top(fewest(model, held, ours, kl))
            row += [f"{alive(found)} ({evaluate(model, found, held).kl:.2f})"]
            row += [f"{edges / alive(found):.2f}"]
        print(f"| {' | '.join(row)} |", flush=True)


def alive(circuit: Circuit) -> int:
    return circuit.without_dead_edges().n_edges


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("scores", type=Path, help="a scores file of settings.py")
    found.add_argument("--task", default="ioi-t1", choices=["ioi-t1", "ioi"])
    found.add_argument("--thresholds", nargs="+", type=float, default=[0.01, 0.003, 0.001])
    found.add_argument("--pairs", type=int, default=8, help="ACDC's pairs (default: 8)")
    found.add_argument(
        "--start", type=int, default=220, help="number of edges at the start of elimination"
    )
    found.add_argument("--stop", type=int, default=50, help="number of edges at its end")
    found.add_argument("--out", type=Path, default=Path("runs/fewer-edges"))
    found.add_argument("--threads", type=int, default=None, help="default: torch's")
    return found


if __name__ == "__main__":
    main()
