"""How good a circuit is: run it, with every other edge replaced, and compare with the full model.

Every figure is a mean over the task's pairs. Logit differences need one answer and one distractor
token a pair; where a task has none, they are None.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.metadata import ablation_of
from tl_edgeprune.circuits.neurons import Neurons
from tl_edgeprune.evaluation.measures import figures_for, standard_error, wrong_agreement
from tl_edgeprune.runs.circuit_runs import PairFigures, sweep
from tl_edgeprune.runs.provenance import check_origin
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
    with neurons.
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

    def to_dict(self) -> dict[str, float | int | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        lines = [
            f"edges kept      {self.n_edges:,} of {self.n_edges_full:,} ({self.n_alive:,} alive)"
        ]
        if self.n_neurons is not None:
            lines.append(f"neurons kept    {self.n_neurons:,} of {self.n_neurons_full:,}")
        if self.kl is not None:
            lines.append(f"KL              {self.kl:z.3f}{_beside('z.3f', no_edges=self.kl_empty)}")
        if self.logit_diff is not None:
            ends = {"full_model": self.logit_diff_full, "no_edges": self.logit_diff_empty}
            lines.append(f"logit diff      {self.logit_diff:z.2f}{_beside('z.2f', **ends)}")
        if self.prob_diff is not None:
            ends = {"full_model": self.prob_diff_full, "no_edges": self.prob_diff_empty}
            lines.append(f"prob diff       {self.prob_diff:z.3f}{_beside('z.3f', **ends)}")
        if self.logit_diff is None and self.prob_diff is None:
            lines.append(f"squared error   {self.mse:.3g}{_beside('.3g', no_edges=self.mse_empty)}")
        if self.faithfulness is not None:
            lines.append(f"faithfulness    {self.faithfulness:z.3f} (full model 1, no edges 0)")
        if self.exact_match is not None:
            lines.append(f"exact match     {100 * self.exact_match:.1f} %")
        if self.accuracy is not None:
            lines.append(f"accuracy        {100 * self.accuracy:.1f} %")
        if self.wrong_agreement is not None:
            share = f"{100 * self.wrong_agreement:.1f} % of {self.n_wrong}"
            lines.append(f"wrong as model  {share}")
        return "\n".join(lines)


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
    full, (empty, *of_circuits) = sweep(
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
    counts = {"n_neurons": neurons.n_neurons, "n_neurons_full": neurons.n_neurons_full}
    return [replace(evaluation, **counts) for evaluation in evaluations]


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


def _evaluation(
    circuit: Circuit, own: PairFigures, full: PairFigures, empty: PairFigures, task: Task
) -> Evaluation:
    means, means_full, means_empty = (
        {name: float(values.mean()) for name, values in figures.items()}
        for figures in (own, full, empty)
    )
    measure = task.metric.replace("-", "_") if "kl" in means else "mse"
    span = means_full[measure] - means_empty[measure]
    difference, full_difference = means.get("logit_diff"), means_full.get("logit_diff")
    right = full.get("accuracy")
    return Evaluation(
        n_pairs=len(task),
        n_edges=circuit.n_edges,
        n_alive=circuit.without_dead_edges().n_edges,
        n_edges_full=circuit.graph.n_edges,
        kl=means.get("kl"),
        kl_sem=standard_error(own["kl"]) if "kl" in own else None,
        js=means.get("js"),
        mse=means["mse"],
        exact_match=means.get("exact_match"),
        accuracy=means.get("accuracy"),
        n_wrong=None if right is None else int((right == 0).sum()),
        wrong_agreement=None if right is None else wrong_agreement(right, own["exact_match"]),
        logit_diff=difference,
        logit_diff_full=full_difference,
        logit_diff_empty=means_empty.get("logit_diff"),
        prob_diff=means.get("prob_diff"),
        prob_diff_full=means_full.get("prob_diff"),
        prob_diff_empty=means_empty.get("prob_diff"),
        recovered=difference / full_difference
        if difference is not None and full_difference
        else None,
        faithfulness=(means[measure] - means_empty[measure]) / span if span else None,
        kl_empty=means_empty.get("kl"),
        mse_empty=means_empty["mse"],
    )


def _beside(form: str, **ends: float | None) -> str:
    """A figure's values at both ends, in brackets, as far as they are known."""
    numbers = [
        f"{name.replace('_', ' ')} {value:{form}}"
        for name, value in ends.items()
        if value is not None
    ]
    return f" ({', '.join(numbers)})" if numbers else ""
