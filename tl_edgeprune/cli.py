"""The command line: `tl-edgeprune demo` prunes a real model and shows what it found."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tl_edgeprune.circuit import Circuit
from tl_edgeprune.evaluate import Evaluation, evaluate_all, evaluate_groups
from tl_edgeprune.methods.eap import eap
from tl_edgeprune.pruner import EdgePruner, PruneResult
from tl_edgeprune.tasks import Task
from tl_edgeprune.tasks import load as load_task

PAIRS, HELD_OUT = 256, 0.25


def main(arguments: list[str] | None = None) -> int:
    """Run a command; errors that a user can mend are one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"tl-edgeprune: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tl-edgeprune", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser("demo", help="prune SmolLM2-135M on indirect object identification")
    demo.add_argument("--task", default="ioi-t1", choices=["ioi-t1", "ioi"], help="default: ioi-t1")
    demo.add_argument("--n-edges", type=int, default=1000, help="edges to keep (default: 1000)")
    demo.add_argument("--steps", type=int, default=150, help="training steps (default: 150)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    demo.set_defaults(run=_demo)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from tl_edgeprune import models  # imports transformers: seconds

    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    print("Loading SmolLM2-135M …", flush=True)
    model = models.load("smollm2-135m")
    task = load_task(options.task, model, PAIRS, options.seed)
    held_out, train = task.split(HELD_OUT, options.seed)
    print(
        f"Task {task.name}: {len(train)} pairs to train on, {len(held_out)} held out.", flush=True
    )
    pruner = EdgePruner(options.n_edges, steps=options.steps, seed=options.seed)
    result = pruner.fit(model, train)
    print("Scoring every edge by EAP, for comparison …", flush=True)
    rival = eap(model, train[:32]).top(options.n_edges)
    figures = evaluate_all(model, [result.circuit, rival], held_out)
    several = len(set(held_out.groups)) > 1
    groups = evaluate_groups(model, [result.circuit, rival], held_out) if several else {}
    _save(options.out, result, figures[0])
    _print_summary(result, held_out, figures, groups)
    print(f"\nIn {options.out}/: circuit.json, history.png, circuit.html (open it in a browser).")
    print(f"Took {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0


def _save(folder: Path, result: PruneResult, figures: Evaluation) -> None:
    from tl_edgeprune.report import plot_history, write_html

    circuit = result.circuit
    title = f"{circuit.metadata['task']} in SmolLM2-135M: {circuit.n_edges:,} edges"
    Circuit(circuit.graph, circuit.mask, circuit.metadata | {"held_out": figures.to_dict()}).save(
        folder / "circuit.json"
    )
    plot_history(result.history, folder / "history.png", title=title)
    lines = {
        "model": str(circuit.metadata["model"]),
        "edges kept": f"{figures.n_edges:,} of {figures.n_edges_full:,}",
        "alive": f"{figures.n_alive:,}",
        "KL, held out": f"{figures.kl:.3f}",
        "exact match": f"{100 * figures.exact_match:.1f} %",
    }
    write_html(
        circuit, folder / "circuit.html", title=title, summary=lines, weights=result.log_alpha
    )


def _print_summary(
    result: PruneResult,
    held_out: Task,
    figures: list[Evaluation],
    groups: dict[str, list[Evaluation]],
) -> None:
    ours, rival = figures
    share = 100 * (1 - ours.n_edges / ours.n_edges_full)
    print(
        f"\nA circuit of {ours.n_edges:,} of {ours.n_edges_full:,} edges ({share:.1f} % pruned), "
        f"on {len(held_out)} pairs that it was not trained on:\n"
    )
    print(f"{'':24}{'Edge Pruning':>14}{'EAP':>10}{'full model':>13}")
    for row in _rows(ours, rival):
        print("{:24}{:>14}{:>10}{:>13}".format(*row))
    if groups:
        print(f"\n{'KL by template':34}{'Edge Pruning':>14}{'EAP':>10}{'pairs':>8}")
        for group, (mine, theirs) in groups.items():
            print(f"{group[:33]:34}{mine.kl:>14.3f}{theirs.kl:>10.3f}{mine.n_pairs:>8}")
    if not result.finished:
        print("\nThe run was stopped early: these are its best edges so far.")


def _rows(ours: Evaluation, rival: Evaluation) -> list[tuple[str, str, str, str]]:
    rows = [
        ("KL to the full model", f"{ours.kl:.3f}", f"{rival.kl:.3f}", "0"),
        (
            "exact match",
            f"{100 * ours.exact_match:.1f} %",
            f"{100 * rival.exact_match:.1f} %",
            "100 %",
        ),
        ("edges alive", f"{ours.n_alive:,}", f"{rival.n_alive:,}", f"{ours.n_edges_full:,}"),
    ]
    if ours.logit_diff is not None and rival.logit_diff is not None:
        full = f"{ours.logit_diff_full:.2f}"
        rows.insert(
            1, ("logit difference", f"{ours.logit_diff:.2f}", f"{rival.logit_diff:.2f}", full)
        )
    if ours.accuracy is not None and rival.accuracy is not None:
        rows.append(
            (
                "answer over distractor",
                f"{100 * ours.accuracy:.1f} %",
                f"{100 * rival.accuracy:.1f} %",
                "",
            )
        )
    return rows
