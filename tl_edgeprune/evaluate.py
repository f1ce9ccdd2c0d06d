"""How good a circuit is: run it, with every other edge replaced, and compare with the full model.

Every figure is a mean over the task's pairs. Logit differences need one answer and one distractor
token a pair; where a task has none, they are None.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.circuit import Circuit
from tl_edgeprune.graph import EdgeGraph
from tl_edgeprune.hooks import is_folded
from tl_edgeprune.masked import MaskedModel
from tl_edgeprune.objectives import has_logit_diff, kl, logit_diff, mean_squared_error
from tl_edgeprune.tasks.task import Task
from tl_edgeprune.teacher import Lesson, Teacher, check_vocabulary


@dataclass(frozen=True)
class Evaluation:
    """A circuit's figures on a task.

    kl: KL(full model || circuit), nats, mean over read positions. mse: mean squared difference of
    the outputs. logit_diff: of the circuit; logit_diff_full, logit_diff_empty: of the full model
    and of the circuit without edges. recovered: logit_diff / logit_diff_full. exact_match: share of
    pairs whose top tokens are the full model's at every read position. accuracy: share whose answer
    has a higher logit than the distractor (or, without one, is the top token). faithfulness: (m(C)
    - m(empty)) / (m(full) - m(empty)) with m the mean logit difference, or minus the mean objective
    where there is none (then m(full) = 0). n_alive: edges on a path from input to logits.
    """

    n_pairs: int
    n_edges: int
    n_alive: int
    n_edges_full: int
    kl: float
    mse: float
    exact_match: float
    accuracy: float | None
    logit_diff: float | None
    logit_diff_full: float | None
    logit_diff_empty: float | None
    recovered: float | None
    faithfulness: float | None

    def to_dict(self) -> dict[str, float | int | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        lines = [
            f"edges kept      {self.n_edges:,} of {self.n_edges_full:,} ({self.n_alive:,} alive)"
        ]
        lines.append(f"KL              {self.kl:.3f}")
        if self.logit_diff is not None:
            lines.append(
                f"logit diff      {self.logit_diff:.2f} (full model {self.logit_diff_full:.2f})"
            )
        lines.append(f"exact match     {100 * self.exact_match:.1f} %")
        if self.accuracy is not None:
            lines.append(f"accuracy        {100 * self.accuracy:.1f} %")
        return "\n".join(lines)


def evaluate(
    model: Any,
    circuit: Circuit,
    task: Task,
    *,
    ablation: str | None = None,
    batch_size: int = 16,
) -> Evaluation:
    """Run the circuit on every pair of the task.

    ablation: the circuit's own by default, else counterfactual. Raises ValueError for a circuit of
    another graph, or one made under zero or mean ablation on differently folded weights.
    """
    return evaluate_all(model, [circuit], task, ablation=ablation, batch_size=batch_size)[0]


def evaluate_all(
    model: Any,
    circuits: list[Circuit],
    task: Task,
    *,
    ablation: str | None = None,
    batch_size: int = 16,
) -> list[Evaluation]:
    """`evaluate` for several circuits of one graph and ablation: the full and the empty runs are
    made once.
    """
    if not circuits:
        return []
    for circuit in circuits:
        check_circuit(model, circuit)
    graph = circuits[0].graph
    if any(circuit.graph != graph for circuit in circuits):
        raise ValueError("circuits of different graphs cannot be evaluated together.")
    kind = ablation or _shared_ablation(circuits)
    check_vocabulary(task, int(model.cfg.d_vocab))
    empty = Circuit(graph, torch.zeros(graph.n_edges, dtype=torch.bool))
    masks = [c.mask for c in (empty, *circuits)]
    sums = [_Sums() for _ in masks]
    full = _Sums()
    with torch.no_grad(), MaskedModel.attach(model, graph) as run:
        teacher = Teacher(run, task, kind, batch_size=batch_size, max_bytes=0)
        for batch in task.batches(batch_size):
            lesson = teacher.lesson(batch)
            full.add(lesson.full, lesson, task)
            for mask, total in zip(masks, sums, strict=True):
                logits = run(
                    lesson.batch.clean,
                    mask.to(teacher.device),
                    lesson.reference,
                    lesson.batch.positions,
                )
                total.add(logits, lesson, task)
    nothing = sums[0].means()
    return [
        _evaluation(circuit, total.means(), full.means(), nothing, task, graph)
        for circuit, total in zip(circuits, sums[1:], strict=True)
    ]


def evaluate_groups(
    model: Any, circuits: list[Circuit], task: Task, *, batch_size: int = 16
) -> dict[str, list[Evaluation]]:
    """`evaluate_all` for each group of the task's pairs (its templates), by the group's name."""
    groups: dict[str, list[int]] = {}
    for pair, group in enumerate(task.groups):
        groups.setdefault(group, []).append(pair)
    return {
        group: evaluate_all(model, circuits, task.subset(pairs), batch_size=batch_size)
        for group, pairs in sorted(groups.items())
    }


def check_circuit(model: Any, circuit: Circuit) -> None:
    """Raise ValueError unless the circuit's graph, and where it matters its weights, are the
    model's.
    """
    graph = circuit.graph
    actual = EdgeGraph.from_model(
        model, split_qkv=graph.split_qkv, split_embeddings=graph.split_embeddings
    )
    if graph != actual:
        raise ValueError(
            f"the circuit is for another model: its graph is {graph}, this model's is {actual}."
        )
    folded = circuit.metadata.get("folded")
    kind = circuit.metadata.get("ablation", "counterfactual")
    if folded is not None and kind != "counterfactual" and folded != is_folded(model):
        raise ValueError(
            f"the circuit was found under {kind} ablation on a model with "
            f"{'folded' if folded else 'unfolded'} norm weights, and this model's are not so: what "
            "an ablated source leaves differs between the two. Load the model as it was then."
        )


def _shared_ablation(circuits: list[Circuit]) -> str:
    kinds = {circuit.metadata.get("ablation", "counterfactual") for circuit in circuits}
    if len(kinds) > 1:
        raise ValueError(
            f"the circuits were found under different ablations ({', '.join(sorted(kinds))}), "
            "whose figures do not compare: give ablation=…, or evaluate them apart."
        )
    return kinds.pop()


class _Sums:
    """Running sums of per-pair figures."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, logits: Float[Tensor, "batch read vocab"], lesson: Lesson, task: Task) -> None:
        batch, full = lesson.batch, lesson.full
        top = logits.argmax(-1)
        figures = {
            "kl": kl(logits, full, batch),
            "mse": mean_squared_error(logits, full, batch),
            "exact_match": (top == full.argmax(-1)).all(-1),
        }
        if has_logit_diff(task):
            figures["logit_diff"] = logit_diff(logits, batch)
            figures["accuracy"] = figures["logit_diff"] > 0
        elif batch.answers.shape[1]:
            figures["accuracy"] = (top == batch.answers).all(-1)
        for name, values in figures.items():
            self._parts.setdefault(name, []).append(values.double().cpu())

    def means(self) -> dict[str, float]:
        return {name: float(torch.cat(parts).mean()) for name, parts in self._parts.items()}


def _evaluation(
    circuit: Circuit,
    own: dict[str, float],
    full: dict[str, float],
    empty: dict[str, float],
    task: Task,
    graph: EdgeGraph,
) -> Evaluation:
    objective = "mse" if task.objective == "mse" else "kl"
    difference, whole, nothing = (figures.get("logit_diff") for figures in (own, full, empty))
    measure = "logit_diff" if difference is not None else objective
    span = full[measure] - empty[measure]
    return Evaluation(
        n_pairs=len(task),
        n_edges=circuit.n_edges,
        n_alive=circuit.without_dead_edges().n_edges,
        n_edges_full=graph.n_edges,
        kl=own["kl"],
        mse=own["mse"],
        exact_match=own["exact_match"],
        accuracy=own.get("accuracy"),
        logit_diff=difference,
        logit_diff_full=whole,
        logit_diff_empty=nothing,
        recovered=difference / whole if difference is not None and whole else None,
        faithfulness=(own[measure] - empty[measure]) / span if span else None,
    )
