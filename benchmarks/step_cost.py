"""The cost of a masked step: forward and backward with edge masks, relative to the plain model.

    python benchmarks/step_cost.py [--layers 4 12 24] [--repeats 7] [--recompute]
    python benchmarks/step_cost.py --kinds smollm2 --layers 30

GPT-2 small's shape, or SmolLM2-135M's, with random weights, 8 prompts of 16 tokens, float32, one
thread. Times are medians of repeats that alternate plain and masked steps in one process. Memory is
the peak resident size over three steps minus that after loading the model, each measured in a fresh
process. It includes the full model's run for the targets (once, before the steps) and a reference
run per step. `--recompute` runs blocks again in backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from shapes import BATCH, KINDS, POS, available, load, prompts
from timing import plain_step, seconds

from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.forward.recompute import RecomputedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph

ENGINES = {"masked": MaskedModel, "recomputed": RecomputedModel}


def masked_step(run: MaskedModel, mask: torch.Tensor, clean: torch.Tensor, reference: Any) -> None:
    positions = torch.full((BATCH, 1), POS - 1)
    logits = run(clean, mask, reference, positions)
    logits.logsumexp(-1).sum().backward()


def time_ratio(kind: str, layers: int, repeats: int, engine: str) -> dict[str, float]:
    model, (clean, corrupted) = load(kind, layers), prompts()
    graph = EdgeGraph.from_model(model)
    mask = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(1)).requires_grad_()
    times: dict[str, list[float]] = {"plain": [], "masked": [], "reference": []}
    with MaskedModel.attach(model, graph) as run:
        reference, _ = run.record(corrupted)
    for _ in range(repeats + 1):
        times["plain"].append(seconds(lambda: plain_step(model, clean)))
        with ENGINES[engine].attach(model, graph) as run:
            times["reference"].append(seconds(lambda: run.record(corrupted)))
            masked_step(run, mask, clean, reference)
            times["masked"].append(seconds(lambda: masked_step(run, mask, clean, reference)))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def forget_peak() -> int:
    """Resets the peak and returns the bytes that are resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Peak resident size since `forget_peak`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's peak memory")


def memory(kind: str, layers: int, step: str) -> int:
    """Peak resident bytes of three steps above the loaded model, in this process."""
    model, (clean, corrupted) = load(kind, layers), prompts()
    before = forget_peak()
    if step == "plain":
        for _ in range(3):
            plain_step(model, clean)
        return peak_bytes() - before
    graph = EdgeGraph.from_model(model)
    mask = torch.full((graph.n_edges,), 0.5, requires_grad=True)
    with ENGINES[step].attach(model, graph) as run:
        run.record(clean, torch.full((BATCH, 1), POS - 1))  # the targets, as in EdgePruner
        for _ in range(3):
            reference = run.reference("counterfactual", corrupted=corrupted)
            masked_step(run, mask, clean, reference)
    return peak_bytes() - before


def memory_apart(kind: str, layers: int, step: str) -> int:
    command = [sys.executable, __file__, "--memory", kind, str(layers), step]
    return int(
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 24])
    parser.add_argument("--kinds", nargs="+", default=None, choices=list(KINDS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--recompute", action="store_true", help="recompute blocks in backward")
    parser.add_argument("--memory", nargs=3, metavar=("KIND", "LAYERS", "STEP"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        kind, layers, step = options.memory
        print(memory(kind, int(layers), step))
        return
    engine = "recomputed" if options.recompute else "masked"
    print("model   layers   plain s  masked s   ratio  reference  MB plain  MB masked")
    for kind in options.kinds or available():
        for layers in options.layers:
            times = time_ratio(kind, layers, options.repeats, engine)
            plain, masked, reference = times["plain"], times["masked"], times["reference"]
            peak = [memory_apart(kind, layers, step) / 1e6 for step in ("plain", engine)]
            print(
                f"{kind:8}{layers:6}{plain:10.3f}{masked:10.3f}{masked / plain:8.2f}"
                f"{reference / plain:11.2f}{peak[0]:10.0f}{peak[1]:11.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
