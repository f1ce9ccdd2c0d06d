"""What `demo` does: prune SmolLM2-135M, compare with EAP, and print and write what it found."""

from __future__ import annotations

import time
from pathlib import Path

from tl_edgeprune import models
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.commands.common.inputs import HELD_OUT, PAIRS
from tl_edgeprune.evaluation.evaluate import Evaluation, evaluate_all, evaluate_groups
from tl_edgeprune.methods.eap import eap
from tl_edgeprune.tasks import Task
from tl_edgeprune.tasks import load as load_task
from tl_edgeprune.training.pruner import EdgePruner
from tl_edgeprune.training.result import PruneResult


def run(task: str, n_edges: int, steps: int, seed: int, out: Path) -> None:
    """Find the circuit, judge it beside EAP's, and write it into the folder."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    print("Loading SmolLM2-135M …", flush=True)
    model = models.load("smollm2-135m")
    pairs = load_task(task, model, PAIRS, seed)
    held_out, train = pairs.split(HELD_OUT, seed)
    print(
        f"Task {pairs.name}: {len(train)} pairs to train on, {len(held_out)} held out.", flush=True
    )
    pruner = EdgePruner(n_edges, steps=steps, seed=seed)
    result = pruner.fit(model, train)
    print("Scoring every edge by EAP, for comparison …", flush=True)
    rival = eap(model, train[:32]).top(n_edges)
    figures = evaluate_all(model, [result.circuit, rival], held_out)
    several = len(set(held_out.groups)) > 1
    groups = evaluate_groups(model, [result.circuit, rival], held_out) if several else {}
    _save(out, result, figures[0])
    _print_summary(result, held_out, figures, groups)
    print(f"\nIn {out}/: circuit.json, history.png, circuit.html (open it in a browser).")
    print(f"Took {(time.monotonic() - started) / 60:.1f} minutes.")


def _save(folder: Path, result: PruneResult, figures: Evaluation) -> None:
    from tl_edgeprune.report import plot_history

    circuit = result.circuit
    title = f"{circuit.metadata['task']} in SmolLM2-135M: {circuit.n_edges:,} edges"
    Circuit(circuit.graph, circuit.mask, circuit.metadata | {"held_out": figures.to_dict()}).save(
        folder / "circuit.json"
    )
    plot_history(result.history, folder / "history.png", title=title)
    circuit.report(folder / "circuit.html", title=title, measures=figures, result=result)


def _print_summary(
    result: PruneResult,
    held_out: Task,
    figures: list[Evaluation],
    groups: dict[str, list[Evaluation]],
) -> None:
    pruned, rival = figures
    share = 100 * (1 - pruned.n_edges / pruned.n_edges_full)
    print(
        f"\nA circuit of {pruned.n_edges:,} of {pruned.n_edges_full:,} edges ({share:.1f} % "
        f"pruned), on {len(held_out)} pairs that it was not trained on:\n"
    )
    print(f"{'':24}{'Edge Pruning':>14}{'EAP':>10}{'full model':>13}")
    for row in _rows(pruned, rival):
        print("{:24}{:>14}{:>10}{:>13}".format(*row))
    if groups:
        print(f"\n{'KL by template':34}{'Edge Pruning':>14}{'EAP':>10}{'pairs':>8}")
        for group, (of_pruned, of_rival) in groups.items():
            print(f"{group[:33]:34}{of_pruned.kl:>14.3f}{of_rival.kl:>10.3f}{of_pruned.n_pairs:>8}")
    if not result.finished:
        print("\nThe run was stopped early: these are its best edges so far.")


def _rows(ours: Evaluation, rival: Evaluation) -> list[tuple[str, str, str, str]]:
    rows = [
        ("KL to the full model", f"{ours.kl:.3f}", f"{rival.kl:.3f}", "0"),
        ("exact match", _percent(ours.exact_match), _percent(rival.exact_match), "100 %"),
        ("edges alive", f"{ours.n_alive:,}", f"{rival.n_alive:,}", f"{ours.n_edges_full:,}"),
    ]
    if ours.logit_diff is not None and rival.logit_diff is not None:
        full = f"{ours.logit_diff_full:.2f}"
        rows.insert(
            1, ("logit difference", f"{ours.logit_diff:.2f}", f"{rival.logit_diff:.2f}", full)
        )
    if ours.accuracy is not None:
        percentages = _percent(ours.accuracy), _percent(rival.accuracy)
        rows.append(("answer over distractor", *percentages, ""))
    return rows


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
