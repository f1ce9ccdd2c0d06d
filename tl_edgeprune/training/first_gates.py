"""The gates on edges, sources and neurons at the start of a run.

Their log alphas are normally distributed, in random order or ranked by attribution scores (a warm
start): of edges by mask-IG, five gradients of the objective by the mask; of neurons by the same
gradients by their gates, every edge kept, as all gates rise from 0 to 1 together.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune.attribution.mask_gradient import gate_scores, path_scores
from tl_edgeprune.attribution.paths import mask_path
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.targets import Targets
from tl_edgeprune.training.gate_group import GateGroup
from tl_edgeprune.training.gates import first_log_alpha, mixed_seed
from tl_edgeprune.training.settings import PrunerSettings

WARM_STEPS, WARM_PAIRS = 5, 32
EDGES, SOURCES, NEURONS = -1, -2, -3  # instead of a step, for the seeds of the first log alphas


def first_gates(
    pruner: PrunerSettings,
    run: MaskedModel,
    targets: Targets,
    loss_of: Objective,
    *,
    progress: bool,
    resumes: bool,
) -> tuple[GateGroup, GateGroup | None, GateGroup | None]:
    """The groups of edges, of sources (with node masks) and of neurons (with gates on them).

    resumes: log alphas will come from a checkpoint, so no scores are computed.
    """
    options: dict[str, Any] = {
        "batch_size": pruner.batch_size,
        "max_pairs": WARM_PAIRS,
        "progress": progress,
    }
    common: dict[str, Any] = {"sampler": pruner.sampler, "hard_share": pruner.hard_share}
    warm = pruner.init_scores is not None and not resumes

    def log_alpha(
        kind: int, spread: tuple[float, float], n_gates: int, scores: Tensor | None = None
    ) -> Float[Tensor, " gate"]:
        generator = torch.Generator().manual_seed(mixed_seed(pruner.seed, kind))
        return first_log_alpha(spread, n_gates, scores, generator).to(targets.device)

    scores, n_edges = None, run.graph.n_edges
    if warm:
        scores = _given_scores(pruner.init_scores, run)
        if scores is None:
            scores = path_scores(run, targets, mask_path(WARM_STEPS), loss_of, **options).abs()
        _check_scores(scores, n_edges)
    start = log_alpha(EDGES, pruner.init_log_alpha, n_edges, scores)
    edges = GateGroup("", start, pruner.controller, pruner.n_edges, **common)

    sources = neurons = None
    if pruner.node_masks:
        spread = (10.0, 0.01) if pruner.init_scores is None else (2.0, 0.01)
        start = log_alpha(SOURCES, spread, run.graph.n_sources)
        sources = GateGroup("node_", start, pruner.node_controller, shifts=False)
    if pruner.neurons is not None:
        scores = None
        if warm:
            scores = gate_scores(run, targets, loss_of, steps=WARM_STEPS, **options)
            scores = scores.flatten().abs()  # [place * unit]
        start = log_alpha(NEURONS, pruner.init_log_alpha, math.prod(run.neuron_shape), scores)
        neurons = GateGroup("neuron_", start, pruner.neuron_controller, pruner.n_neurons, **common)
    return edges, sources, neurons


def _given_scores(scores: Any, run: MaskedModel) -> Float[Tensor, " edge"] | None:
    """The scores that the user gave for ranking the edges; None to compute them."""
    if isinstance(scores, EdgeScores):
        if scores.graph != run.graph:
            raise ValueError(
                f"init_scores are for another graph: {scores.graph}; the graph of this run is "
                f"{run.graph}."
            )
        return scores.ranking().float()
    return scores.detach().cpu().float().abs() if isinstance(scores, Tensor) else None


def _check_scores(scores: Float[Tensor, " edge"], n_edges: int) -> None:
    if scores.shape != (n_edges,):
        raise ValueError(f"init_scores has shape {tuple(scores.shape)}, expected ({n_edges},).")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("init_scores holds NaN or infinite values.")
