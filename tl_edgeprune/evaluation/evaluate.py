"""How good a circuit is: run it, with every other edge replaced, and compare with the full model.

Every figure is a mean over the task's pairs. Logit differences need one answer and one distractor
token a pair; where a task has none, they are None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.metadata import ablation_of
from tl_edgeprune.circuits.neurons import Neurons
from tl_edgeprune.evaluation.measures import MEASURES, Measure, standard_error, wrong_agreement
from tl_edgeprune.objectives import find_measure
from tl_edgeprune.runs.circuit_runs import Figures, PairFigures, run_circuits
from tl_edgeprune.runs.provenance import check_origin
from tl_edgeprune.runs.targets import TargetBatch
from tl_edgeprune.tasks.task import Task


@dataclass(frozen=True)
class Evaluation:
    """A circuit's figures on a task, each a mean over its pairs. None: the task lacks the tokens,
    or the model's output is one number, which has no distribution and no top token.

    kl: KL(full model || circuit), nats, mean over read positions; kl_sem: its standard error over
    pairs. js: Jensen-Shannon divergence, nats. mse: mean squared difference of the outputs.
    kl_empty, mse_empty: of the circuit without edges, what kl and mse are to be judged by.
    exact_match: share of pairs whose top tokens are the full model's at every read position.
    accuracy: share whose answer has a higher logit than the distractor (without one: is the top
    token; with sets alone: whose right tokens have more probability than the wrong ones). n_wrong:
    pairs that the full model gets wrong in this sense; wrong_agreement: share of those on which the
    circuit has the model's own top tokens (None without any). logit_diff: of the circuit;
    logit_diff_full, logit_diff_empty: of the full model and of the circuit without edges;
    prob_diff, …: probability of the right tokens less that of the wrong ones, likewise. recovered:
    logit_diff / logit_diff_full. faithfulness: (m(C) - m(empty)) / (m(full) - m(empty)) with m the
    mean logit difference, else the mean probability difference, else minus the mean of the task's
    own objective (squared error where the output is one number). n_alive: edges on a path from
    input to logits. n_neurons, n_neurons_full: neurons kept, and those that there are, of a circuit
    with neurons. extra: measures that were registered from outside (measures.py), by name; each is
    an attribute too.
    """

    n_pairs: int
    n_edges: int
    n_alive: int
    n_edges_full: int
    kl: float | None
    kl_sem: float | None
    js: float | None
    mse: float
    exact_match: float | None
    accuracy: float | None
    n_wrong: int | None
    wrong_agreement: float | None
    logit_diff: float | None
    logit_diff_full: float | None
    logit_diff_empty: float | None
    prob_diff: float | None
    prob_diff_full: float | None
    prob_diff_empty: float | None
    recovered: float | None
    faithfulness: float | None
    n_neurons: int | None = None
    n_neurons_full: int | None = None
    kl_empty: float | None = None
    mse_empty: float | None = None

    extra: dict[str, float | None] = field(default_factory=dict, hash=False)

    def __getattr__(self, name: str) -> float | None:
        """A measure that was registered from outside (`extra`)."""
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def to_dict(self) -> dict[str, float | int | None]:
        return {name: getattr(self, name) for name in _fields()} | self.extra

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """What `to_dict` gave."""
        known, names = dict(values), _fields()
        own = {name: known.pop(name) for name in names if name in known}
        return cls(**own, extra=known)

    def __str__(self) -> str:
        lines = [
            f"edges kept      {self.n_edges:,} of {self.n_edges_full:,} ({self.n_alive:,} alive)"
        ]
        if self.n_neurons is not None:
            lines.append(f"neurons kept    {self.n_neurons:,} of {self.n_neurons_full:,}")
        values = self.to_dict()
        for measure in MEASURES.values():
            value = values.get(measure.name)
            skipped = any(values.get(name) is not None for name in measure.unless)
            if measure.heading and value is not None and not skipped:
                note = measure.note.format(n_wrong=self.n_wrong) + _beside(measure, values)
                lines.append(f"{measure.heading:15} {measure.written(value)}{note}")
        return "\n".join(lines)


def _fields() -> list[str]:
    return [each.name for each in fields(Evaluation) if each.name != "extra"]


def evaluate(
    model: Any,
    circuit: Circuit,
    task: Task,
    *,
    ablation: Ablation | None = None,
    batch_size: int = 16,
    neurons: Neurons | None = None,
) -> Evaluation:
    """Run the circuit on every pair of the task.

    ablation: the circuit's own by default, else counterfactual. neurons: those that are kept beside
    the edges (`result.neurons`); all by default. Raises ValueError for a circuit or neurons of
    another graph, or a circuit made under zero or mean ablation on differently folded weights.
    """
    settings: dict[str, Any] = {"ablation": ablation, "batch_size": batch_size}
    return evaluate_all(model, [circuit], task, neurons=neurons, **settings)[0]


def evaluate_all(
    model: Any,
    circuits: list[Circuit],
    task: Task,
    *,
    ablation: Ablation | None = None,
    batch_size: int = 16,
    neurons: Neurons | None = None,
) -> list[Evaluation]:
    """`evaluate` for several circuits of one graph and ablation (and with the same neurons): the
    full and the empty runs are made once.
    """
    if not circuits:
        return []
    for circuit in circuits:
        check_circuit(model, circuit)
    graph = circuits[0].graph
    if any(circuit.graph != graph for circuit in circuits):
        raise ValueError("circuits of different graphs cannot be evaluated together.")
    masks = [torch.zeros(graph.n_edges, dtype=torch.bool), *(c.mask for c in circuits)]
    full, (empty, *of_circuits) = run_circuits(
        model,
        graph,
        masks,
        task,
        figures_for(task),
        ablation=_shared_ablation(circuits) if ablation is None else ablation,
        batch_size=batch_size,
        neurons=neurons,
    )
    evaluations = [
        _evaluation(circuit, figures, full, empty, task)
        for circuit, figures in zip(circuits, of_circuits, strict=True)
    ]
    if neurons is None:
        return evaluations
    kept, total = neurons.n_neurons, neurons.n_neurons_full
    return [replace(each, n_neurons=kept, n_neurons_full=total) for each in evaluations]


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


def check_circuit(model: Any, circuit: Any) -> None:
    """Raise ValueError unless the circuit's graph, and where it matters its weights, are the
    model's, and TypeError for what is no circuit.
    """
    if not isinstance(circuit, Circuit):
        raise TypeError(
            f"expected a Circuit, got a {type(circuit).__name__}: take result.circuit of a run, "
            "scores.top(k) of scores, or Circuit.from_edges(graph, names)."
        )
    check_origin(model, circuit.graph, circuit.metadata)


def _shared_ablation(circuits: list[Circuit]) -> str:
    kinds = {ablation_of(circuit.metadata) for circuit in circuits}
    if len(kinds) > 1:
        raise ValueError(
            f"the circuits were found under different ablations ({', '.join(sorted(kinds))}), "
            "whose figures do not compare: give ablation=…, or evaluate them apart."
        )
    return kinds.pop()


def figures_for(task: Task) -> Figures:
    """Every measure of a run on a batch that the task has the tokens for, each [batch].

    kl, js and exact_match unless the model has a single output, whose probability is always 1.
    Raises ValueError if the task's answers do not suffice for its metric.
    """
    find_measure(None, task)
    functions = {
        measure: function
        for measure in MEASURES.values()
        if measure.for_task is not None and (function := measure.for_task(task)) is not None
    }

    def figures(logits: Tensor, target_batch: TargetBatch) -> Mapping[str, Tensor]:
        batch, full = target_batch.batch, target_batch.full
        values = {
            measure.name: function(logits, full, batch)
            for measure, function in functions.items()
            if measure.of_numbers or full.shape[-1] > 1
        }
        for name, each in values.items():
            if each.shape != (len(batch),):
                raise ValueError(
                    f"measure {name!r} gave values of shape {tuple(each.shape)}, expected one per "
                    f"pair, ({len(batch)},)."
                )
        return values

    return figures


def _evaluation(
    circuit: Circuit, own: PairFigures, full: PairFigures, empty: PairFigures, task: Task
) -> Evaluation:
    means, means_full, means_empty = (
        {name: float(values.mean()) for name, values in figures.items()}
        for figures in (own, full, empty)
    )
    metric = task.metric.replace("-", "_") if "kl" in means else "mse"
    span = means_full[metric] - means_empty[metric]
    difference, full_difference = means.get("logit_diff"), means_full.get("logit_diff")
    right, agreement = full.get("accuracy"), None
    if right is not None:
        agreement = wrong_agreement(right, own["exact_match"])
    return Evaluation.from_dict(
        {
            "n_pairs": len(task),
            "n_edges": circuit.n_edges,
            "n_alive": circuit.without_dead_edges().n_edges,
            "n_edges_full": circuit.graph.n_edges,
            "n_wrong": None if right is None else int((right == 0).sum()),
            "wrong_agreement": agreement,
            "recovered": _ratio(difference, full_difference),
            "faithfulness": (means[metric] - means_empty[metric]) / span if span else None,
            "kl_sem": standard_error(own["kl"]) if "kl" in own else None,
        }
        | _values_of_measures(means, {"full": means_full, "empty": means_empty})
    )


def _ratio(part: float | None, full: float | None) -> float | None:
    return part / full if part is not None and full else None


def _values_of_measures(
    means: Mapping[str, float], at_ends: Mapping[str, Mapping[str, float]]
) -> dict[str, float | None]:
    """The means of all measures that have a function, at their ends too."""
    values: dict[str, float | None] = {}
    for measure in MEASURES.values():
        if measure.for_task is not None and measure.reported:
            values[measure.name] = means.get(measure.name)
            for end in measure.ends:
                values[f"{measure.name}_{end}"] = at_ends[end].get(measure.name)
    return values


def _beside(measure: Measure, values: Mapping[str, float | int | None]) -> str:
    """The measure's values of the full model and of no edges, in brackets, if they are known."""
    names = {"full": "full model", "empty": "no edges"}
    known = [
        f"{names[end]} {measure.written(value)}"
        for end in measure.ends
        if (value := values.get(f"{measure.name}_{end}")) is not None
    ]
    return f" ({', '.join(known)})" if known else ""
