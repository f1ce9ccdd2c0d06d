"""The command line.

`tl-edgeprune demo` prunes a real model and shows what it found; `tl-edgeprune plan` says before a
run what memory it takes and which batch fits.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tl_edgeprune.circuit import Circuit
from tl_edgeprune.evaluate import Evaluation, evaluate_all, evaluate_groups
from tl_edgeprune.methods.eap import eap
from tl_edgeprune.planner import PASSES, Work, find_shape, fitting_pairs, step_bytes, step_floor
from tl_edgeprune.pruner import EdgePruner, PruneResult
from tl_edgeprune.tasks import Task
from tl_edgeprune.tasks import load as load_task

PAIRS, HELD_OUT = 256, 0.25
RESERVED = 2e9  # a GPU's own context and its libraries' workspaces
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

app = typer.Typer(
    name="tl-edgeprune",
    help="Finds circuits in TransformerLens models by Edge Pruning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and give its exit code; errors that a user can mend are one line on stderr."""
    try:
        app(args=arguments, prog_name="tl-edgeprune")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """The command, its errors told in one line."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        try:
            command(**options)
        except (ValueError, OSError, NotImplementedError) as error:
            print(f"tl-edgeprune: {error}", file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


@app.command()
@_told
def demo(
    task: Annotated[Literal["ioi-t1", "ioi"], typer.Option(help="The task.")] = "ioi-t1",
    n_edges: Annotated[int, typer.Option(help="Edges to keep.")] = 1000,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 150,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder for what it found.")] = Path("runs/demo"),
) -> None:
    """Prune SmolLM2-135M on indirect object identification."""
    from tl_edgeprune import models  # imports transformers: seconds

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


@app.command()
@_told
def plan(
    model: Annotated[str, typer.Option(help="A shape's name, as benchmarks/scale.py takes.")],
    gpu_memory: Annotated[float, typer.Option(help="The GPU's memory in GB (10^9 bytes).")],
    pos: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 64,
    pairs: Annotated[int | None, typer.Option(help="Pairs a step; else what fits.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")
    ] = "bfloat16",
) -> None:
    """Say which batch fits a GPU with blocks recomputed, and what a step takes."""
    shape, element = find_shape(model), BYTES[dtype]
    if pos < 1 or (pairs is not None and pairs < 1):
        raise ValueError(f"--pos {pos}, --pairs {pairs}: expected 1 or more.")
    room = int(gpu_memory * 1e9 - RESERVED)
    most = fitting_pairs(shape, pos, room, element=element, on_gpu=True)
    least = Work(1, pos, element=element, on_gpu=True)
    if not most:
        need = (sum(step_bytes(shape, least).values()) + RESERVED) / 1e9
        raise ValueError(
            f"{model} in {dtype} does not fit: one pair of {pos} tokens a forward takes {need:.1f} "
            f"GB, and {gpu_memory:g} GB are there. Take bfloat16, shorter prompts or a larger GPU."
        )
    wanted = pairs or most
    forwards = -(-wanted // most)
    work = Work(-(-wanted // forwards), pos, element=element, on_gpu=True)
    print(f"{model}: {shape.graph.n_edges:,} edges, {dtype}, prompts of {pos} tokens")
    print(f"At most {most} pairs a forward fit into {gpu_memory:g} GB.")
    if pairs is not None:
        print(f"For {pairs} pairs a step: batch_size={work.pairs}, accumulate={forwards}.")
    print(f"\nMemory of {work.pairs} pairs a forward, GB:")
    planned = {**step_bytes(shape, work), "reserved": int(RESERVED)}
    for name, size in {**planned, "in all": sum(planned.values())}.items():
        print(f"  {name:20}{size / 1e9:10.2f}")
    print("\nThe least that each pass of a forward's pairs does:   TFLOP    GB moved")
    floors = {name: passed(shape, work) for name, passed in PASSES.items()}
    for name, floor in {**floors, "one training step": step_floor(shape, work)}.items():
        print(f"  {name:48}{floor.operations / 1e12:10.2f}{floor.bytes / 1e9:12.1f}")


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
