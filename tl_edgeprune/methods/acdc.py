"""ACDC: remove edges one at a time, from the logits back, where the objective hardly notices.

1. Start from the full model. Its objective (KL to itself by default) is the current value.
2. Visit destinations in reverse topological order: the logits; then, from the last layer to the
   first, its MLP and its heads' values, keys and queries, each from the last head to the first.
   Within a destination visit sources from the latest to the earliest. (This is the reverse of
   `graph.edges`.)
3. Remove the edge if the objective, mean over all pairs of the task, is then less than `threshold`
   above its current value, and make it the new current value. Otherwise keep the edge.
4. A destination from which no kept edges lead to the logits cannot matter: its edges are removed
   without a run. (If heads of a layer act on one another beside the residual stream, by a norm
   over their sum, such a destination can matter, and its edges are tried like all others.)

Conmy, Mavor-Parker, Lynch, Heimersheim and Garriga-Alonso 2023, "Towards Automated Circuit
Discovery for Mechanistic Interpretability" (arXiv 2304.14997), algorithm 1. As in the published
code, the value to compare with is that of the last accepted removal. The paper leaves the order of
queries, keys and values open; here it is that of step 2.

`search/sequential.py` decides several edges in one run, with the sequence's own result;
`search="bisect"` removes groups of edges instead (`search/grouped.py`).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.methods.registry import register
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.resume import Saved
from tl_edgeprune.runs.session import open_session
from tl_edgeprune.runs.targets import BAR_AFTER
from tl_edgeprune.search.cuts import find_cuts
from tl_edgeprune.search.full_cuts import FullCuts
from tl_edgeprune.search.grouped import Stage, in_groups
from tl_edgeprune.search.partial_cuts import PartialCuts
from tl_edgeprune.search.sequential import one_by_one
from tl_edgeprune.search.single_edges import SingleEdges
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.utils.reading import check_type

SEARCHES = ("exact", "bisect")
FIRST = Stage()


@register("acdc", gives_circuit=True)
def acdc(
    model: Any,
    task: Task,
    *,
    threshold: float,
    objective: str | Objective | None = None,
    search: str = "exact",
    graph: EdgeGraph | None = None,
    positions: str | None = None,
    ablation: Ablation = "counterfactual",
    batch_size: int = 8,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Circuit:
    """The edges whose removal raises the objective by at least `threshold`, found from the logits
    back.

    Args:
        threshold: the rise at which an edge is kept, in units of the objective (nats for the KL).
        objective: what should stay low; the task's own by default.
        search: "exact", the published sequence; or "bisect", many edges at once and far fewer
            runs, for an objective with a gradient.
        positions: "span" or "position" for edges with a mask in each (runs/task_checks.py); within
            a destination, spans are visited from the last to the first.
        batch_size: pairs per forward pass. Every pair of the task is used, whatever it is.
        checkpoint: a file that the state is saved to every half minute; if it exists, the run
            continues from it.

    Returns a Circuit. Its metadata hold threshold, search, `runs` (how often the objective was
    evaluated on all pairs) and `objective_at_end`.

    Warns if no edge or every edge is kept. Raises ValueError for a negative or NaN threshold,
    an unknown search, and the checkpoint of another run.
    """
    _check(threshold, search)
    with open_session(
        model,
        task,
        graph=graph,
        positions=positions,
        objective=objective,
        ablation=ablation,
        batch_size=batch_size,
        metadata={"method": "acdc", "threshold": float(threshold), "search": search},
        settings={"objective": objective, "ablation": ablation},
        checkpoint=checkpoint,
        max_bytes=0,
    ) as session:
        graph, saved = session.graph, session.saved
        mask, undecided, runs, stage = _saved_search(saved, graph)
        cuts = find_cuts(session.run, session.targets, session.loss_of, batch_size=batch_size)
        bar = tqdm(
            total=graph.n_edges, desc="acdc", unit="edge", disable=not progress, delay=BAR_AFTER
        )
        with bar:
            report = _reporter(cuts, bar, saved)
            cuts.set(mask)
            cuts.runs += runs
            report(undecided, stage)
            if search == "exact":
                one_by_one(cuts, threshold, undecided, report)
            else:
                in_groups(
                    cuts,
                    session.targets,
                    threshold,
                    undecided,
                    stage,
                    report,
                    batch_size=batch_size,
                )
    counts = {"runs": cuts.runs, "objective_at_end": cuts.value}
    counts |= {"partial_runs": isinstance(cuts, PartialCuts)}
    circuit = Circuit(graph, cuts.mask, session.metadata | counts)
    _warn_of_extremes(circuit, threshold)
    return circuit


# ----------------------------------------------------------------------------------- the run around


def _check(threshold: float, search: str) -> None:
    if not threshold >= 0:
        raise ValueError(
            f"threshold={threshold}: expected 0 or more, the rise of the objective at which an "
            "edge is kept."
        )
    if search not in SEARCHES:
        raise ValueError(f"unknown search {search!r}: expected one of {', '.join(SEARCHES)}.")


def _warn_of_extremes(circuit: Circuit, threshold: float) -> None:
    if circuit.n_edges not in (0, circuit.graph.n_edges):
        return
    all_or_no, direction = ("no", "lower") if circuit.n_edges == 0 else ("every", "higher")
    warnings.warn(
        f"ACDC at threshold={threshold:g} keeps {all_or_no} edge: a {direction} threshold gives a "
        "more informative circuit.",
        stacklevel=3,
    )


def _reporter(cuts: FullCuts, bar: Any, saved: Saved) -> Callable[..., None]:
    """A function that shows and saves that the edges from `edge` on are decided."""

    def report(edge: int, stage: Stage = FIRST) -> None:
        n_kept = int(cuts.mask[edge:].sum())
        bar.set_postfix(objective=f"{cuts.value:.4g}", kept=n_kept, refresh=False)
        bar.update(max(0, bar.total - edge - bar.n))
        singles = None if stage.singles is None else asdict(stage.singles)
        tensors = {"kept": cuts.mask}
        if singles is not None:
            tensors["rises"] = singles.pop("rises")
        values: dict[str, Any] = {"decided_from": edge, "runs": cuts.runs}
        values |= {"reach": stage.reach, "singles": singles}
        saved.save(tensors, values)

    return report


def _saved_search(saved: Saved, graph: EdgeGraph) -> tuple[Tensor, int, int, Stage]:
    """The mask, the edge from which on edges are decided, the runs so far, the stage."""
    state = saved.load()
    if state is None:
        return torch.ones(graph.n_edges, dtype=torch.bool), graph.n_edges, 0, FIRST
    tensors, values = state
    with saved.damaged():
        mask = tensors["kept"]
        decided = check_type(values["decided_from"], int, "decided_from")
        runs = check_type(values["runs"], int, "runs")
        stage = Stage(_checked_reach(values["reach"]), _singles(values["singles"], tensors, graph))
        if mask.dtype != torch.bool or mask.shape != (graph.n_edges,):
            raise ValueError(f"kept is {mask.dtype} of shape {tuple(mask.shape)}")
        if not 0 <= decided <= graph.n_edges or runs < 0:
            raise ValueError(f"it says {runs} runs, and edges decided from {decided} on")
    return mask, decided, runs, stage


def _checked_reach(reach: Any) -> float | None:
    if reach is not None and not 0 <= check_type(reach, float, "reach") < math.inf:
        raise ValueError(f"it says that groups reach {reach}")
    return reach


def _singles(note: Any, tensors: dict[str, Tensor], graph: EdgeGraph) -> SingleEdges | None:
    """The state of trying edges by themselves."""
    if note is None:
        return None
    values = check_type(note, dict, "singles")
    reads_left, removed = (
        check_type(values[name], int, name) for name in ("reads_left", "removed")
    )
    narrow, rises = check_type(values["narrow"], bool, "narrow"), tensors["rises"]
    if not 0 <= reads_left <= len(graph.reads) or removed < 0:
        raise ValueError(f"it says {reads_left} reads left, {removed} edges removed")
    if rises.dtype != torch.float64 or rises.shape != (graph.n_edges,):
        raise ValueError(f"rises is {rises.dtype} of shape {tuple(rises.shape)}")
    return SingleEdges(rises, reads_left, removed, narrow)
