"""Each method's cost, relative to a plain forward and backward of the same model.

    python benchmarks/methods.py [--kinds hooked] [--repeats 5] [--only eap]
    python benchmarks/methods.py --kinds smollm2 --layers 30

GPT-2 small's shape, or SmolLM2-135M's, with random weights, 8 pairs of 16 tokens, float32, one
thread, one process; medians of CPU time over rounds that run every row once. The unit is a
plain forward and backward with frozen weights. Attribution times a whole call of `discover` on the
8 pairs. Circuits have 1,000 edges. A training step uses cached targets and references. ACDC runs
on the same shape with two layers, since twelve take hours; its unit is that model's.

If auto-circuit is installed (peers/README.md), its rows follow ours.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from shapes import KINDS, available, load, pairs
from timing import Step, medians, plain_forward, plain_step, seconds

from tl_edgeprune import Circuit, EdgeGraph, EdgePruner, Task, discover
from tl_edgeprune.forward.masked_model import MaskedModel

Steps = dict[str, Step]
UNIT = "forward+backward"
CIRCUIT = 1_000
TRAINING = 3  # steps that a row's one training run takes
ATTRIBUTION: dict[str, dict[str, int]] = {
    "eap": {},
    "eap-ig": {"steps": 5},
    "mask-ig": {"steps": 5},
    "clean-corrupted": {},
}


def plain_rows(model: Any, task: Task) -> Steps:
    clean = torch.stack(list(task.clean))
    return {
        UNIT: lambda: plain_step(model, clean),
        "forward": lambda: plain_forward(model, clean),
    }


def own_rows(model: Any, task: Task) -> Steps:
    def attribution(method: str, settings: dict[str, int]) -> Step:
        return lambda: discover(model, task, method=method, objective="logit-diff", **settings)

    label = {"steps": " ({} steps)"}
    rows: Steps = {
        method + "".join(label[k].format(v) for k, v in settings.items()): attribution(
            method, settings
        )
        for method, settings in ATTRIBUTION.items()
    }
    rows |= evaluation_rows(model, task)
    rows["edge pruning, per step"] = lambda: training_step(model, task)
    return rows


def evaluation_rows(model: Any, task: Task) -> Steps:
    """A reference run, and one masked forward pass of a circuit with a given reference."""
    batch, graph = next(task.batches(len(task))), EdgeGraph.from_model(model)
    scores = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(1))
    mask = Circuit.top(graph, scores, min(CIRCUIT, graph.n_edges // 2)).mask.float()

    def reference() -> None:
        with MaskedModel.attach(model, graph) as run:
            run.reference("counterfactual", corrupted=batch.corrupted)

    def circuit() -> float:
        with torch.no_grad(), MaskedModel.attach(model, graph) as run:
            given = run.reference("counterfactual", corrupted=batch.corrupted)
            return seconds(lambda: run(batch.clean, mask, given, batch.read_positions))

    return {"reference run": reference, "a circuit": circuit}


def training_step(model: Any, task: Task) -> float:
    """One step of Edge Pruning: a run of a few steps minus a run of one step, per step."""

    def run(steps: int) -> float:
        pruner = EdgePruner(
            CIRCUIT, steps=steps, batch_size=len(task), init_scores=None, progress=False
        )
        return seconds(lambda: pruner.fit(model, task))

    return (run(1 + TRAINING) - run(1)) / TRAINING


# ----------------------------------------------------------------------------- auto-circuit


def peer_rows(model: Any, task: Task) -> Steps:
    """auto-circuit's rows; empty if it is not installed, or for a Bridge."""
    if importlib.util.find_spec("auto_circuit") is None or hasattr(model, "original_model"):
        return {}
    from peers import auto_circuit as peer

    wrapped, batches, graph = peer.wrapped(model), peer.loader(task), EdgeGraph.from_model(model)
    scores = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(1))
    scores = peer.as_scores(scores, wrapped, graph)
    size = min(CIRCUIT, graph.n_edges // 2)

    def circuit() -> float:
        whole = seconds(lambda: peer.circuit_logits(wrapped, batches, scores, [size]))
        return whole - seconds(lambda: peer.circuit_logits(wrapped, batches, scores, []))

    def probing() -> float:
        several = seconds(lambda: peer.subnetwork_probing(wrapped, batches, TRAINING))
        none = seconds(lambda: peer.subnetwork_probing(wrapped, batches, 0))
        return (several - none) / TRAINING

    return {
        "auto-circuit: eap": lambda: peer.eap(wrapped, batches),
        "auto-circuit: a circuit": circuit,
        "auto-circuit: subnetwork probing, per step": probing,
    }


# -------------------------------------------------------------------------------------- ACDC


def acdc_rows(model: Any, task: Task) -> Steps:
    """Seconds per edge, ours and auto-circuit's, at a threshold that removes nearly all edges."""
    graph, threshold, rows = EdgeGraph.from_model(model), 1e-3, {}
    if importlib.util.find_spec("tl_edgeprune.methods.acdc") is not None:
        from tl_edgeprune.methods.acdc import acdc

        rows["acdc, per edge"] = lambda: (
            seconds(lambda: acdc(model, task, threshold=threshold, search="exact")) / graph.n_edges
        )
    if importlib.util.find_spec("auto_circuit") is not None and not hasattr(
        model, "original_model"
    ):
        from peers import auto_circuit as peer

        wrapped, batches = peer.wrapped(model), peer.loader(task)
        rows["auto-circuit: acdc, per edge"] = lambda: (
            seconds(lambda: peer.acdc_scores(wrapped, batches, threshold)) / graph.n_edges
        )
    return rows


# ------------------------------------------------------------------------------------- report


def table(
    kind: str, layers: int, repeats: int, rows: list[Callable[..., Steps]], only: str
) -> None:
    model, task = load(kind, layers), pairs()
    steps: Steps = {}
    for make in rows:
        steps |= make(model, task)
    steps = {name: step for name, step in steps.items() if name == UNIT or only in name}
    times = medians(steps, repeats)
    print(f"\n{kind}, {layers} layers: {UNIT} {times[UNIT]:.3f} s, median of {repeats}")
    for name, value in times.items():
        print(f"{name:<42}{value / times[UNIT]:8.2f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--kinds", nargs="+", default=available(), choices=list(KINDS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="only rows whose names contain this")
    parser.add_argument("--acdc", action="store_true", help="also time ACDC (takes minutes)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in options.kinds:
        rows = [plain_rows, own_rows, peer_rows]
        table(kind, options.layers, options.repeats, rows, options.only)
        if options.acdc:
            table(kind, 2, 1, [plain_rows, acdc_rows], options.only)


if __name__ == "__main__":
    main()
