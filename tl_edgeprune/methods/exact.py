"""Exact activation patching of every edge: the rise of the objective when it alone is removed.

A score is objective(full model without the edge) - objective(full model), mean over the task's
pairs: what EAP and its kin approximate by gradients. Wang et al. 2022 (path patching of one edge);
Conmy et al. 2023.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.objectives import Objective, find_objective
from tl_edgeprune.runs.provenance import origin
from tl_edgeprune.runs.resume import Saved, saving
from tl_edgeprune.runs.targets import BAR_AFTER, Teacher
from tl_edgeprune.runs.task_checks import check_tokens, graph_at
from tl_edgeprune.search.cuts import find_cuts
from tl_edgeprune.search.edge_effects import each_rise
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.utils.reading import of_kind
from tl_edgeprune.utils.tensor_files import floats


def exact(
    model: Any,
    task: Task,
    *,
    objective: str | Objective | None = None,
    graph: EdgeGraph | None = None,
    positions: str | None = None,
    ablation: Ablation = "counterfactual",
    batch_size: int = 8,
    edges: Iterable[str] | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> EdgeScores:
    """The rise of the objective when each edge alone is removed from the full model.

    A score above 0 says that removing the edge raises the loss. objective: the task's own by
    default. positions: "span" or "position" for edges with a mask in each. edges: names of those to
    score, all by default; the others' scores are 0. checkpoint: a file to save to every half
    minute; if it is there, the run goes on. Raises KeyError for an unknown edge, and ValueError as
    `find_objective` does and for another run's checkpoint.
    """
    if isinstance(edges, str):
        raise ValueError(f"edges={edges!r}: expected a list of names, such as [{edges!r}].")
    loss_of = find_objective(objective, task)
    check_tokens(task, model)
    graph = graph_at(model, graph, task, positions)
    about = origin(model, task, method="exact", objective=objective, ablation=ablation)
    names = None if edges is None else sorted(edges)
    settings = {"objective": objective, "ablation": ablation, "batch_size": batch_size}
    with (
        MaskedModel.attach(model, graph) as run,
        saving(checkpoint, about, settings | {"edges": names}, run, task) as saved,
    ):
        wanted = list(range(run.graph.n_edges))
        if names is not None:
            wanted = sorted({run.graph.index(edge) for edge in names})
        scores, done, runs = _before(saved, run.graph, len(wanted))
        teacher = Teacher(run, task, ablation, batch_size=batch_size, max_bytes=0)
        cuts = find_cuts(run, teacher, loss_of, batch_size=batch_size)
        cuts.set(torch.ones(run.graph.n_edges, dtype=torch.bool))
        cuts.runs += runs
        bar = tqdm(
            total=len(wanted), desc="patching", unit="edge", disable=not progress, delay=BAR_AFTER
        )
        with bar:
            bar.update(done)
            for some, rises in each_rise(cuts, wanted[done:]):
                scores[some] = rises
                bar.update(len(some))
                done += len(some)
                saved.save({"scores": scores}, {"done": done, "runs": cuts.runs})
    return EdgeScores(run.graph, scores.float(), about | {"runs": cuts.runs})


def _before(saved: Saved, graph: EdgeGraph, wanted: int) -> tuple[Tensor, int, int]:
    """The scores so far, of how many of the wanted edges they are, and the runs they took."""
    found = saved.load()
    if found is None:
        return torch.zeros(graph.n_edges, dtype=torch.float64), 0, 0
    tensors, values = found
    with saved.damaged():
        scores = floats(tensors, "scores", (graph.n_edges,)).double()
        done, runs = (of_kind(values[name], int, name) for name in ("done", "runs"))
        if not 0 <= done <= wanted or runs < 0:
            raise ValueError(f"it says {done} edges in {runs} runs")
    return scores, done, runs
