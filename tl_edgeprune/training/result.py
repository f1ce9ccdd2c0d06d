"""The result of a run: the ranking of edges, its circuit and its history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.ablation.constants import Constants
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.neurons import Neurons
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.modules import is_folded
from tl_edgeprune.tasks.stream import AnyTask
from tl_edgeprune.training.settings import PrunerSettings
from tl_edgeprune.utils.reading import check_type


@dataclass(frozen=True, repr=False)
class PruneResult:
    """The result of a run: a ranking of all edges, and the circuit of its top edges.

    Attributes:
        graph: the graph of the ranking.
        log_alpha: [edge], the ranking of the edges.
        history: the figures of each step: its loss, expected edges, target and seconds so far.
        n_edges: edges of `circuit`; None for a run without a single size.
        metadata: the origin of the result, with the run's settings.
        finished: False if Ctrl-C ended the run early.
        constants: what removed edges carried under ablation="optimal" or Constants: the `ablation`
            to evaluate the circuit with.
        neuron_kind: "mlp" or "dimensions" in a run with gates on neurons.
        neuron_log_alpha: [place, unit], the ranking of the neurons.
        n_neurons: neurons of `neurons`; None for a run without a single number of them.
    """

    graph: EdgeGraph
    log_alpha: Float[Tensor, " edge"]
    history: History
    n_edges: int | None
    metadata: dict[str, Any]
    finished: bool = True
    constants: Constants | None = None
    neuron_kind: str | None = None
    neuron_log_alpha: Float[Tensor, "place unit"] | None = None
    n_neurons: int | None = None

    @property
    def circuit(self) -> Circuit:
        """The `n_edges` edges of highest log alpha. Raises ValueError if n_edges is None."""
        if self.n_edges is None:
            raise ValueError("this run had no single size (n_edges=None): use result.top(k).")
        return self.top(self.n_edges)

    @property
    def neurons(self) -> Neurons | None:
        """The `n_neurons` neurons of highest log alpha; None in a run without gates on neurons."""
        if self.neuron_log_alpha is None:
            return None
        if self.n_neurons is None:
            raise ValueError(
                "this run had no single number of neurons (n_neurons=None): use "
                "result.top_neurons(k)."
            )
        return self.top_neurons(self.n_neurons)

    def top_neurons(self, k: int) -> Neurons:
        """The k neurons of highest log alpha. Raises ValueError in a run without neurons."""
        if self.neuron_kind is None or self.neuron_log_alpha is None:
            raise ValueError("this run had no gates on neurons: use EdgePruner(neurons=…).")
        scores, kind = self.neuron_log_alpha, self.neuron_kind
        return Neurons.top(self.graph, kind, scores, k, **self.metadata)

    @property
    def scores(self) -> EdgeScores:
        """log alpha as edge scores, ranked as they are (`top` takes no magnitudes)."""
        return EdgeScores(self.graph, self.log_alpha, dict(self.metadata), by_magnitude=False)

    def top(self, k: int) -> Circuit:
        """The k edges of highest log alpha."""
        return Circuit.top(self.graph, self.log_alpha, k, **self.metadata)

    def __repr__(self) -> str:
        steps = len(self.history)
        size = f"{self.n_edges:,} edges" if self.n_edges else "any size"
        early = "" if self.finished else ", stopped early"
        return f"PruneResult({size} of {self.graph.n_edges:,}, {steps} steps{early})"


History = list[dict[str, float | int]]
FIGURES = ("step", "loss", "edges", "target", "seconds")
NEURON_FIGURES = ("neurons", "neuron_target")


def history_from(values: Any) -> History:
    """A history read from JSON. Raises KeyError, TypeError or ValueError if it is not one."""
    history = []
    for step, entry in enumerate(check_type(values, list, "history")):
        if entry["step"] != step:
            raise ValueError(f"history has step {entry['step']} instead of {step}")
        names = (*FIGURES, *(name for name in NEURON_FIGURES if name in entry))
        history.append({name: check_type(entry[name], float, name) for name in names})
    return history


def run_metadata(pruner: PrunerSettings, run: MaskedModel, task: AnyTask) -> dict[str, Any]:
    """What a run's result says of its origin."""
    model = run.model
    return {
        "method": "edge-pruning",
        "model": getattr(model.cfg, "model_name", type(model).__name__),
        "task": task.name,
        "n_pairs": len(task),
        "prepend_bos": task.prepend_bos,
        "seed": pruner.seed,
        "ablation": str(pruner.ablation),
        "folded": is_folded(model),
        "d_model": int(model.cfg.d_model),
        "settings": pruner.settings(),
    }
