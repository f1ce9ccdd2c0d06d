"""Stability: how far a method finds the same circuit again, over seeds and resampled pairs.

A circuit of one run is evidence about the model only as far as another seed, or other pairs of the
same task, give it too.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.circuits.circuit import Circuit, check_budget
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.methods import registry
from tl_edgeprune.runs.task_checks import graph_at
from tl_edgeprune.tasks.task import Task


@dataclass(frozen=True)
class Stability:
    """Circuits of repeated runs, in the order of `runs`.

    runs: (seed, resample) of each: the method's seed (None where it takes none) and the number of
    the bootstrap resample (None for the task as it is).
    """

    circuits: tuple[Circuit, ...]
    runs: tuple[tuple[int | None, int | None], ...]

    def __str__(self) -> str:
        sizes = sorted({circuit.n_edges for circuit in self.circuits})
        edges = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        return f"{len(self.circuits)} circuits of {edges} edges, mean Jaccard {self.jaccard:.2f}"

    @property
    def graph(self) -> EdgeGraph:
        return self.circuits[0].graph

    @property
    def jaccard(self) -> float:
        """Edges in both over edges in either, mean over all pairs of runs."""
        overlaps = [a.iou(b) for a, b in itertools.combinations(self.circuits, 2)]
        return sum(overlaps) / len(overlaps)

    @property
    def frequencies(self) -> Float[Tensor, " edge"]:
        """The share of runs whose circuit has the edge."""
        return torch.stack([circuit.mask for circuit in self.circuits]).float().mean(0)

    def core(self, threshold: float = 1.0) -> Circuit:
        """The edges in at least this share of the runs; by default in all of them."""
        first, *further = (circuit.metadata for circuit in self.circuits)
        shared = {k: v for k, v in first.items() if all(o.get(k) == v for o in further)}
        n_circuits = threshold * len(self.circuits) - 1e-9
        counts = torch.stack([circuit.mask for circuit in self.circuits]).sum(0)
        return Circuit(self.graph, (counts >= n_circuits) & (counts > 0), shared)


def stability(
    model: Any,
    task: Task,
    method: str = "eap",
    *,
    size: int,
    seeds: Sequence[int] = (0, 1, 2),
    bootstraps: int = 0,
    absolute: bool | None = None,
    **settings: Any,
) -> Stability:
    """Circuits of `size` edges from repeated runs of a method.

    Args:
        size: edges of every circuit; ACDC's have the sizes that it chooses.
        seeds: a run for each, where the method takes a seed.
        bootstraps: resamples of the task's pairs (as many, drawn with replacement, the same for
            every seed); 0 runs on the task as it is. A method without a seed runs once on each.
        absolute: rank edges by magnitude; None for what fits the method's scores.
        settings: the method's own.

    Raises ValueError for fewer than two runs, as of a deterministic method without bootstraps, an
    unknown method, and a size that the graph does not allow.
    """
    every_seed: Sequence[int | None] = tuple(seeds) if takes_seed(method) else (None,)
    resamples: list[int | None] = list(range(bootstraps)) if bootstraps else [None]
    runs = tuple(itertools.product(every_seed, resamples))
    if len(runs) < 2:
        _refuse(method, every_seed)
    graph = settings.get("graph") or EdgeGraph.from_model(model)
    check_budget(size, graph_at(model, graph, task, settings.get("positions")) or graph)
    circuits = []
    for seed, resample in runs:
        pairs = task if resample is None else bootstrap(task, resample)
        run_settings = settings if seed is None else settings | {"seed": seed}
        result = registry.discover(model, pairs, method=method, **run_settings)
        if not result.metadata.get("finished", True):  # Edge Pruning keeps what Ctrl-C left it
            raise KeyboardInterrupt
        circuits.append(
            result if isinstance(result, Circuit) else result.top(size, absolute=absolute)
        )
    return Stability(tuple(circuits), runs)


def bootstrap(task: Task, seed: int) -> Task:
    """As many pairs, drawn from the task with replacement."""
    return task.subset(random.Random(seed).choices(range(len(task)), k=len(task)))


def takes_seed(method: str) -> bool:
    """Whether a method of the registry takes a seed. Raises ValueError for an unknown one."""
    return "seed" in registry.find_method(method).parameters


def _refuse(method: str, seeds: Sequence[int | None]) -> None:
    if seeds == (None,):
        raise ValueError(
            f"{method} takes no seed: it gives the same circuit every time. Give bootstraps=… (2 "
            "or more) to resample the task's pairs."
        )
    raise ValueError(
        f"one run of {method} has nothing to be compared with: give two or more seeds, or "
        "bootstraps=…."
    )
