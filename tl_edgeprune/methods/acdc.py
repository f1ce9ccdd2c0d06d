"""ACDC: remove edges one at a time, from the logits back, where the objective hardly notices.

1. Start from the full model. Its objective (KL to itself by default) is the current value.
2. Visit destinations in reverse topological order: the logits; then from the last layer to the
   first its MLP, its heads' values, keys and queries, each from the last head to the first.
   Within a destination visit sources from the latest to the earliest. (All that is the reverse of
   `graph.edges`.)
3. Remove the edge if the objective, mean over all pairs of the task, then is less than `threshold`
   above its current value, which becomes the new current value. Otherwise keep the edge.
4. A destination that leads to the logits by no kept edge cannot matter: its edges are removed
   without a run. (Where heads of a layer act on one another beside the residual stream, by a norm
   over their sum, they can matter, and are tried like all others.)

Conmy, Mavor-Parker, Lynch, Heimersheim and Garriga-Alonso 2023, "Towards Automated Circuit
Discovery for Mechanistic Interpretability" (arXiv 2304.14997), algorithm 1. As in the published
code, the value to compare with is that of the last accepted removal. It leaves open how queries,
keys and values are ordered; step 2 says it.

`sequence.py` decides several edges in one run, with the sequence's own result; `search="bisect"`
removes groups of edges instead (`bisect.py`).
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune.checkpoints import digest
from tl_edgeprune.circuit import Circuit
from tl_edgeprune.constants import Ablation
from tl_edgeprune.cuts import PartCuts, WholeCuts, find_cuts
from tl_edgeprune.files import write_whole
from tl_edgeprune.graph import EdgeGraph
from tl_edgeprune.locks import held_file
from tl_edgeprune.masked import MaskedModel
from tl_edgeprune.methods.bisect import Stage, in_groups
from tl_edgeprune.methods.gradients import origin
from tl_edgeprune.methods.sequence import one_by_one
from tl_edgeprune.objectives import Objective, find_objective
from tl_edgeprune.positions import graph_at
from tl_edgeprune.strangers import damaged, of_kind, read_json
from tl_edgeprune.tasks.stream import identity
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.teacher import Teacher, check_vocabulary

SEARCHES = ("exact", "bisect")
SAVE_SECONDS = 30.0
ANEW = "Remove it to start anew."
FIRST = Stage()


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
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Circuit:
    """The edges whose removal raises the objective by at least `threshold`, found from the logits
    back.

    Args:
        threshold: the rise at which an edge is kept, in units of the objective (nats for the KL).
        objective: what should stay low; the task's own by default.
        search: "exact", the published sequence; or "bisect", many edges at once and far fewer
            runs, for an objective with a gradient.
        positions: "span" or "position" for edges with a mask in each (positions.py); within a
            destination, spans are visited from the last to the first.
        batch_size: pairs that run together. Every pair of the task is used, whatever it is.
        checkpoint: a JSON file to save to every half minute; if it is there, the run goes on.

    Returns a Circuit. Its metadata tell threshold, search, `runs` (how often the objective was
    evaluated on all pairs) and `objective_at_end`.

    Warns where no edge or every edge is kept. Raises ValueError for a negative or NaN threshold,
    an unknown search, and a checkpoint of another run.
    """
    _check(threshold, search)
    loss_of = find_objective(objective, task)
    check_vocabulary(task, int(model.cfg.d_vocab))
    graph = graph_at(model, graph, task, positions)
    about = origin(
        model,
        task,
        method="acdc",
        objective=objective,
        ablation=ablation,
        threshold=float(threshold),
        search=search,
    )
    alone = nullcontext() if checkpoint is None else held_file(checkpoint)
    with alone, MaskedModel.attach(model, graph) as run:
        saved = _Saved(
            checkpoint, about | {"graph": run.graph.to_dict(), "pairs": digest(identity(task))}
        )
        mask, start, runs, stage = saved.load(run.graph)
        teacher = Teacher(run, task, ablation, batch_size=batch_size, max_bytes=0)
        cuts = find_cuts(run, teacher, loss_of, batch_size=batch_size)
        with tqdm(total=run.graph.n_edges, desc="acdc", unit="edge", disable=not progress) as bar:
            report = _reporter(cuts, bar, saved)
            cuts.set(mask)
            cuts.runs += runs
            report(start, stage)
            if search == "exact":
                one_by_one(cuts, threshold, start, report)
            else:
                in_groups(cuts, teacher, threshold, start, stage, report, batch_size=batch_size)
    circuit = Circuit(
        run.graph,
        cuts.mask,
        about
        | {"runs": cuts.runs, "objective_at_end": cuts.value}
        | {"partial_runs": isinstance(cuts, PartCuts)},
    )
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
    all_or_no, other = ("no", "lower") if circuit.n_edges == 0 else ("every", "higher")
    warnings.warn(
        f"ACDC at threshold={threshold:g} keeps {all_or_no} edge: a {other} threshold gives a "
        "circuit that tells something.",
        stacklevel=3,
    )


def _reporter(cuts: WholeCuts, bar: Any, saved: _Saved) -> Callable[..., None]:
    """Tell the bar and the checkpoint that the edges from `edge` on are decided."""

    def report(edge: int, stage: Stage = FIRST) -> None:
        bar.update(max(0, bar.total - edge - bar.n))
        bar.set_postfix(objective=f"{cuts.value:.4g}", kept=int(cuts.mask[edge:].sum()))
        saved.save(cuts, edge, stage)

    return report


class _Saved:
    """A run's state on disk: which edges are decided, and which of them are kept."""

    def __init__(self, path: str | os.PathLike[str] | None, about: dict[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._about = json.loads(json.dumps(about))
        self._last = time.monotonic()

    def load(self, graph: EdgeGraph) -> tuple[Tensor, int, int, Stage]:
        """The mask, the edge from which on edges are decided, the runs so far, the stage."""
        mask = torch.ones(graph.n_edges, dtype=torch.bool)
        if self._path is None or not self._path.exists():
            return mask, graph.n_edges, 0, FIRST
        document = read_json(self._path, "checkpoint of ACDC", ANEW)
        with damaged(self._path, ANEW):
            about = of_kind(document["about"], dict, "about")
            removed = of_kind(document["removed"], list, "removed")
            decided = of_kind(document["decided_from"], int, "decided_from")
            runs = of_kind(document["runs"], int, "runs")
            places = [decided, *(of_kind(edge, int, "an edge") for edge in removed)]
            stage = _stage(of_kind(document["stage"], dict, "stage"))
            if not all(0 <= place <= graph.n_edges for place in places) or runs < 0:
                raise ValueError("it has edges that this graph has not")
            mask[torch.tensor(removed, dtype=torch.long)] = False
        if about != self._about:
            different = sorted(k for k in self._about if about.get(k) != self._about[k])
            raise ValueError(
                f"checkpoint {self._path} is of another run ({', '.join(different)} differ): give "
                "another path, or remove it to start anew."
            )
        return mask, decided, runs, stage

    def save(self, cuts: WholeCuts, edge: int, stage: Stage) -> None:
        if self._path is None or time.monotonic() - self._last < SAVE_SECONDS:
            return
        removed = (~cuts.mask).nonzero().flatten().tolist()
        document = {"about": self._about, "decided_from": edge, "runs": cuts.runs}
        document["stage"] = asdict(stage)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(document | {"removed": removed}).encode())
        self._last = time.monotonic()


def _stage(saved: dict[str, Any]) -> Stage:
    reach, single = saved["reach"], of_kind(saved["single"], bool, "single")
    if reach is not None and not 0 <= of_kind(reach, float, "reach") < math.inf:
        raise ValueError(f"it says that groups reach {reach}")
    return Stage(reach, single)
