"""Optimisations that were tried and not adopted: what each would gain.

    python benchmarks/left_out.py [--repeats 9]

GPT-2 small's shape, 8 prompts of 16 tokens, float32, one thread. Compares a norm and a GELU of one
block with and without torch.compile, and a layer's product of masks and differences in
bfloat16, and in float32 on two threads, with float32 on one (wall-clock seconds). Also prints the
share of a masked step's CPU time in matrix products, which fusion cannot save. Medians of
rounds that run each once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from shapes import BATCH, GPT2, POS, gpt2_bridge, prompts
from step_cost import masked_step
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph

ROWS, D_MODEL, HEADS = BATCH * POS, GPT2["n_embd"], GPT2["n_head"]
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
Work = Callable[[], Tensor]


def norm(inputs: Tensor) -> Tensor:
    return functional.layer_norm(inputs, (D_MODEL,))


def gelu(inputs: Tensor) -> Tensor:
    return functional.gelu(inputs, approximate="tanh")


def compiled() -> dict[str, tuple[Work, Work]]:
    """The norm of all attention reads of a block, and a GELU, each also compiled."""
    reads, hidden = torch.randn(3 * HEADS, ROWS, D_MODEL), torch.randn(ROWS, 4 * D_MODEL)
    fast_norm, fast_gelu = torch.compile(norm), torch.compile(gelu)
    return {
        "a norm, compiled": (lambda: norm(reads), lambda: fast_norm(reads)),
        "a GELU, compiled": (lambda: gelu(hidden), lambda: fast_gelu(hidden)),
    }


def mixes() -> tuple[Work, Work]:
    """The mixes of the last layer's heads, [destination, source] @ [source, row * d_model], and the
    same in bfloat16.
    """
    sources = 1 + 11 * (HEADS + 1)
    mask, differences = torch.rand(3 * HEADS, sources), torch.randn(sources, ROWS * D_MODEL)
    half = mask.bfloat16(), differences.bfloat16()
    return lambda: mask @ differences, lambda: half[0] @ half[1]


def on_threads(count: int, work: Work) -> Work:
    """The same work on `count` threads."""

    def on_them() -> Tensor:
        torch.set_num_threads(count)
        try:
            return work()
        finally:
            torch.set_num_threads(1)

    return on_them


def medians(works: Mapping[str, Work], repeats: int) -> dict[str, float]:
    """Median wall-clock seconds; the first round warms up (and compiles)."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def share_of_products() -> float:
    """The share of a masked step's CPU time in matrix products."""
    model, (clean, corrupted) = gpt2_bridge(), prompts()
    graph = EdgeGraph.from_model(model)
    mask = torch.full((graph.n_edges,), 0.5, requires_grad=True)
    with MaskedModel.attach(model, graph) as run:
        reference, _ = run.record(corrupted)
        masked_step(run, mask, clean, reference)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            masked_step(run, mask, clean, reference)
    own = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return sum(own.get(name, 0.0) for name in PRODUCTS) / sum(own.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    product, half = mixes()
    pairs = compiled() | {"a mix, bfloat16": (product, half)}
    pairs |= {"a mix, two threads": (product, on_threads(2, product))}
    for name, (plain, other) in pairs.items():
        with torch.no_grad():
            found = medians({"plain": plain, "other": other}, options.repeats)
        print(f"{name:20}{found['other'] / found['plain']:8.2f} ×", flush=True)
    print(f"{'matrix products':20}{share_of_products():8.0%} of a masked step")


if __name__ == "__main__":
    main()
