"""The groups of gates at the start of a run: edges, sources (node masks) and neurons.

Log alphas start from a normal distribution, in random order or ranked by attribution scores of the
task (a warm start): for edges mask-IG, five gradients of the objective by the mask; for neurons the
same by their gates, every edge kept, on a path on which all gates rise from 0 to 1 together.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.attribution.mask_gradient import gate_scores, path_scores
from tl_edgeprune.attribution.paths import mask_path
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.targets import Teacher
from tl_edgeprune.training.gate_group import GateGroup
from tl_edgeprune.training.gates import first_log_alpha, mixed_seed
from tl_edgeprune.training.settings import PrunerSettings

WARM_STEPS, WARM_PAIRS = 5, 32
EDGES, SOURCES, NEURONS = -1, -2, -3  # in place of a step, for the seeds of the first log alphas
NODE_STD = 0.01


class FirstGates(NamedTuple):
    """Makes the groups of gates of a run.

    `resumes`: the log alphas come from a checkpoint, so no scores are computed.
    """

    pruner: PrunerSettings
    run: MaskedModel
    teacher: Teacher
    loss_of: Objective
    progress: bool
    resumes: bool

    def edges(self) -> GateGroup:
        pruner, n_edges = self.pruner, self.run.graph.n_edges
        scores = None
        if pruner.init_scores is not None and not self.resumes:
            scores = _checked_scores(self._edge_scores(), n_edges)
        log_alpha = self._log_alpha(EDGES, pruner.init_log_alpha, n_edges, scores)
        return GateGroup(
            "",
            log_alpha,
            pruner.controller,
            pruner.n_edges,
            sampler=pruner.sampler,
            hard_share=pruner.hard_share,
        )

    def sources(self) -> GateGroup | None:
        """Gates that multiply all edges of a source. Their controller only prices them."""
        if not self.pruner.node_masks:
            return None
        mean = 10.0 if self.pruner.init_scores is None else 2.0
        log_alpha = self._log_alpha(SOURCES, (mean, NODE_STD), self.run.graph.n_sources, None)
        return GateGroup("node_", log_alpha, self.pruner.node_controller, shifts=False)

    def neurons(self) -> GateGroup | None:
        pruner = self.pruner
        if pruner.neurons is None:
            return None
        scores = None
        if pruner.init_scores is not None and not self.resumes:
            scores = self._neuron_scores().flatten().abs()
        n_neurons = math.prod(self.run.neuron_shape)
        return GateGroup(
            "neuron_",
            self._log_alpha(NEURONS, pruner.init_log_alpha, n_neurons, scores),
            pruner.neuron_controller,
            pruner.n_neurons,
            sampler=pruner.sampler,
            hard_share=pruner.hard_share,
        )

    def _log_alpha(
        self,
        kind: int,
        mean_and_std: tuple[float, float],
        n_gates: int,
        scores: Float[Tensor, " gate"] | None,
    ) -> Float[Tensor, " gate"]:
        generator = torch.Generator().manual_seed(mixed_seed(self.pruner.seed, kind))
        return first_log_alpha(mean_and_std, n_gates, scores, generator).to(self.teacher.device)

    def _edge_scores(self) -> Float[Tensor, " edge"]:
        """The scores that the first log alphas of edges are ranked by."""
        scores = self.pruner.init_scores
        if isinstance(scores, EdgeScores):
            return _ranking_of_scores(scores, self.run.graph)
        if isinstance(scores, Tensor):
            return scores.detach().cpu().float().abs()
        return path_scores(
            self.run,
            self.teacher,
            mask_path(WARM_STEPS),
            self.loss_of,
            batch_size=self.pruner.batch_size,
            max_pairs=WARM_PAIRS,
            progress=self.progress,
        ).abs()

    def _neuron_scores(self) -> Float[Tensor, "place unit"]:
        return gate_scores(
            self.run,
            self.teacher,
            self.loss_of,
            steps=WARM_STEPS,
            batch_size=self.pruner.batch_size,
            max_pairs=WARM_PAIRS,
            progress=self.progress,
        )


def _ranking_of_scores(scores: EdgeScores, graph: EdgeGraph) -> Float[Tensor, " edge"]:
    if scores.graph != graph:
        raise ValueError(
            f"init_scores are for another graph: {scores.graph}; the graph of this run is {graph}."
        )
    return scores.ranking().float()


def _checked_scores(scores: Float[Tensor, " edge"], n_edges: int) -> Float[Tensor, " edge"]:
    if scores.shape != (n_edges,):
        raise ValueError(f"init_scores has shape {tuple(scores.shape)}, expected ({n_edges},).")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("init_scores holds NaN or infinite values.")
    return scores
