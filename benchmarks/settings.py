"""Edge Pruning's settings, changed one at a time: the quality of circuits in SmolLM2-135M.

    python benchmarks/settings.py [--variants default lr-0.1 …] [--seeds 0 1 2 3 4] [--out …]

Indirect object identification, 64 held-out pairs. Every run is a row of runs.csv in the folder: the
held-out KL and exact match at --n-edges and the KL of its ranking at other sizes. history/ has
the KL of the training steps. Finished rows are not repeated, so a killed run continues; several
processes can run different variants. All variants use the last step's ranking, to compare settings
instead of chance, except "judged", which is EdgePruner's full default. A polished circuit starts
from the default's run, whose file is used if it exists; then its seconds are only those of the
exchanges.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from changed_steps import cooling, late_16, stepping, two_masks
from torch import Tensor

from tl_edgeprune import EdgePruner, EdgeScores, discover, models, polish, tasks
from tl_edgeprune.evaluation.evaluate import evaluate_all
from tl_edgeprune.objectives import kl, negative_log_prob
from tl_edgeprune.tasks.batch import Batch
from tl_edgeprune.training.controllers import ExactBudget
from tl_edgeprune.training.first_gates import WARM_PAIRS
from tl_edgeprune.training.pruner import Optimizer


def kl_and_excess(logits: Tensor, full: Tensor, batch: Batch) -> Tensor:
    """The KL plus the excess of the answer's log-probability over the full model's, in nats."""
    excess = negative_log_prob(full, full, batch) - negative_log_prob(logits, full, batch)
    return kl(logits, full, batch) + excess.clamp(min=0)


LAST_STEP = {"candidates": 0}
AT_ONCE = ExactBudget("sampled", anneal=0.001)  # small budgets from the first step
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "lr-0.1": {"lr": 0.1},
    "lr-0.3": {"lr": 0.3},
    "lr-0.5": {"lr": 0.5},
    "betas-0.8-0.95": {"optimizer": Optimizer((0.8, 0.95))},
    "betas-0.9-0.999": {"optimizer": Optimizer((0.9, 0.999))},
    "decay": {"optimizer": Optimizer(decay=True)},
    "init-none": {"init_scores": None},
    "init-eap": {"init_scores": "eap"},
    "init-eap-ig": {"init_scores": "eap-ig"},
    "init-wide": {"init_log_alpha": (0.0, 2.0)},
    "hard-0": {"hard_share": 0.0},
    "hard-0.2": {"hard_share": 0.2},
    "hard-0.6": {"hard_share": 0.6},
    "anneal-0.4": {"controller": ExactBudget(anneal=0.4)},
    "anneal-0.8": {"controller": ExactBudget(anneal=0.8), "hard_share": 0.2},
    "start-0.1": {"controller": ExactBudget(start_share=0.1)},
    "any-size": {"n_edges": None},
    "any-size-lr-0.1": {"n_edges": None, "lr": 0.1},
    "any-size-lr-0.2": {"n_edges": None, "lr": 0.2},
    "any-size-hard-0": {"n_edges": None, "hard_share": 0.0},
    "any-size-last": {"n_edges": None, "average_share": 0.0},
    "at-once": {"n_edges": None, "controller": AT_ONCE},
    "at-once-lr-0.2": {"n_edges": None, "controller": AT_ONCE, "lr": 0.2},
    "at-once-last": {"n_edges": None, "controller": AT_ONCE, "average_share": 0.0},
    "average-0.4": {"average_share": 0.4},
    "fixed": {"controller": ExactBudget("fixed")},
    "batch-16": {"batch_size": 16},
    "accumulate-2": {"accumulate": 2},
    "masks-2": {"step": two_masks},
    "late-16": {"step": late_16},
    "cooling": {"step": cooling},
    "no-excess": {"objective": kl_and_excess},
    "polish-8": {"polish": 8},
    "pairs-64": {"pairs": 64},
    "pairs-1024": {"pairs": 1024},
    "pairs-1024-lr-0.1": {"pairs": 1024, "lr": 0.1},
    "judged": {"candidates": 10},
    "pairs-1024-judged": {"pairs": 1024, "candidates": 10},
}
HELD_OUT, MOST_PAIRS = 64, 1024
SIZES = (200, 500, 1000, 2300, 10_000)
FIELDS = ("variant", "seed", "steps", "lr", "n_edges", "kl", "exact_match", "alive", "seconds")
FIELDS += tuple(f"kl_{size}" for size in SIZES)


def done(path: Path) -> set[tuple[str, int, int, float, int]]:
    """Variant, seed, steps, learning rate and size of the finished rows."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = [(int(r["seed"]), int(r["steps"]), float(r["lr"]), int(r["n_edges"])) for r in rows]
    return {(row["variant"], *values) for row, values in zip(rows, numbers, strict=True)}


def add(path: Path, row: dict[str, Any]) -> None:
    """Appends a row, in one write."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def rate(name: str) -> float:
    """The learning rate of a variant's runs."""
    own = {key: VARIANTS[name][key] for key in ("n_edges", "lr") if key in VARIANTS[name]}
    return EdgePruner(**{"n_edges": 1, **own}).lr


def run_of(model: Any, train: Any, settings: dict[str, Any], scores: Path) -> tuple[Any, list[Any]]:
    """A run's scores, which are also saved, and its history. init_scores may name a method, which
    gets as many pairs as the usual warm start, and the KL if it can use it.
    """
    if isinstance(settings.get("init_scores"), str):
        method = settings["init_scores"]
        objective = "logit-diff" if method == "eap" else "kl"
        first = discover(model, train[:WARM_PAIRS], method, objective=objective)
        settings = settings | {"init_scores": first}
    step = settings.pop("step", None)
    with nullcontext() if step is None else stepping(step):
        result = EdgePruner(progress=False, **settings).fit(model, train)
    result.scores.save(scores)
    return result.scores, [[round(s["loss"], 4), round(s["edges"])] for s in result.history]


def measured(model: Any, task: Any, name: str, seed: int, options: Any, out: Path) -> list[Any]:
    """One variant's row; writes its history and its scores."""
    settings = {"n_edges": options.n_edges, "steps": options.steps, "seed": seed, **LAST_STEP}
    settings |= VARIANTS[name]
    train = task[HELD_OUT:][: settings.pop("pairs", options.pairs)]
    rounds = settings.pop("polish", 0)  # of the default run's circuit
    file = f"{'default' if rounds else name}-{seed}-{options.steps}"
    started = time.monotonic()
    path = out / f"{file}.safetensors"
    if rounds and path.exists():
        scores, history = EdgeScores.load(path), []
    else:
        scores, history = run_of(model, train, settings, path)
    circuit = scores.top(options.n_edges)
    if rounds:
        circuit = polish(model, train, circuit, rounds=rounds)
    seconds = time.monotonic() - started
    circuits = [circuit, *map(scores.top, SIZES)]
    found, *sized = evaluate_all(model, circuits, task[:HELD_OUT])
    if history:
        document = {"columns": ["loss", "edges"], "steps": history}
        (out / "history" / f"{file}.json").write_text(json.dumps(document))
    row = [name, seed, options.steps, rate(name), options.n_edges, found.kl, found.exact_match]
    return [*row, found.n_alive, round(seconds), *(round(other.kl, 4) for other in sized)]


def main() -> None:
    options = parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = models.load("smollm2-135m")
    task = tasks.load(options.task, model, HELD_OUT + max(MOST_PAIRS, options.pairs), 0)
    out = options.out or Path("runs") / f"settings-{options.task}"
    (out / "history").mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.variants:
            asked = (name, seed, options.steps, rate(name), options.n_edges)
            if asked not in done(out / "runs.csv"):
                values = measured(model, task, name, seed, options, out)
                row = dict(zip(FIELDS, values, strict=True))
                add(out / "runs.csv", row)
                print(row, flush=True)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_option = found.add_argument
    add_option("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    add_option("--seeds", nargs="+", type=int, default=[0])
    add_option("--task", default="ioi-t1", choices=["ioi-t1", "ioi"])
    add_option("--pairs", type=int, default=192, help="training pairs (default: 192)")
    add_option("--n-edges", type=int, default=1000)
    add_option("--steps", type=int, default=200)
    add_option("--threads", type=int, default=None, help="default: torch's")
    add_option("--out", type=Path, default=None, help="default: runs/settings-{task}")
    return found


if __name__ == "__main__":
    main()
