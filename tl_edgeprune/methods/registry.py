"""Discovery methods by name: `discover(model, task, method="eap")`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tl_edgeprune.attribution.mask_gradient import scores_along
from tl_edgeprune.attribution.output_gram import scores_of_gram
from tl_edgeprune.circuits.circuit import Circuit
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.methods.acdc import acdc
from tl_edgeprune.methods.clean_corrupted import clean_corrupted
from tl_edgeprune.methods.eap import eap
from tl_edgeprune.methods.eap_graddrop import eap_graddrop
from tl_edgeprune.methods.eap_ig import eap_ig
from tl_edgeprune.methods.eap_ig_activations import eap_ig_activations
from tl_edgeprune.methods.edge_pruning import edge_pruning
from tl_edgeprune.methods.exact import exact
from tl_edgeprune.methods.greedy_output import greedy_output
from tl_edgeprune.methods.hisp import hisp
from tl_edgeprune.methods.ifr import ifr
from tl_edgeprune.methods.mask_ig import mask_ig
from tl_edgeprune.methods.random_scores import random_scores
from tl_edgeprune.methods.relp import relp
from tl_edgeprune.methods.subnetwork_probing import subnetwork_probing
from tl_edgeprune.methods.subspace_nodes import subspace_nodes
from tl_edgeprune.methods.ugs import ugs
from tl_edgeprune.tasks.stream import AnyTask, TaskStream
from tl_edgeprune.training.pruner import EdgePruner
from tl_edgeprune.utils.suggest import did_you_mean

METHODS: dict[str, Callable[..., EdgeScores | Circuit]] = {
    "edge-pruning": edge_pruning,
    "eap": eap,
    "eap-ig": eap_ig,
    "eap-ig-activations": eap_ig_activations,
    "clean-corrupted": clean_corrupted,
    "mask-ig": mask_ig,
    "ugs": ugs,
    "subnetwork-probing": subnetwork_probing,
    "hisp": hisp,
    "ifr": ifr,
    "eap-graddrop": eap_graddrop,
    "relp": relp,
    "exact": exact,
    "acdc": acdc,
    "greedy-output": greedy_output,
    "subspace-nodes": subspace_nodes,
    "random": random_scores,
}
GIVE_CIRCUITS = ("acdc",)  # they choose the size themselves; the others rank all edges
# Their further settings are EdgePruner's, or those of what they call; the others' scores_along's.
TRAINED = ("edge-pruning", "ugs", "subnetwork-probing")
_SET = {  # what makes them what they are
    "ugs": ("controller", "sampler", "init_scores", "init_log_alpha"),
    "subnetwork-probing": ("controller", "init_scores", "init_log_alpha"),
}
_SHARED = dict.fromkeys(("greedy-output", "subspace-nodes"), scores_of_gram)


def discover(
    model: Any, task: AnyTask, method: str = "edge-pruning", **settings: Any
) -> EdgeScores | Circuit:
    """Score every edge of a model for a task; a method that chooses the size gives a circuit.

    Args:
        method: a name in `METHODS`.
        settings: the method's own.

    Raises ValueError for an unknown method, a setting that it does not take or one that it needs
    and did not get, TypeError for a stream of pairs that it does not take, and what the method
    raises.
    """
    names = settings_of(method)
    if isinstance(task, TaskStream) and method not in TRAINED:
        raise TypeError(
            f"{method} takes a Task, got a TaskStream: give some of its pairs, such as "
            "stream.chunk(0)."
        )
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise ValueError(
            f"{method} takes no {' and no '.join(unknown)}: expected some of {', '.join(names)}."
        )
    missing = [name for name in needed_by(method) if name not in settings]
    if missing:
        raise ValueError(
            f"{method} needs {' and '.join(missing)}: give discover(…, {method!r}, "
            f"{', '.join(f'{name}=…' for name in missing)})."
        )
    return METHODS[method](model, task, **settings)


def needed_by(method: str) -> list[str]:
    """Names of the settings that a method cannot do without."""
    parameters = inspect.signature(METHODS[method]).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def settings_of(method: str) -> tuple[str, ...]:
    """Names of the settings that a method takes. Raises ValueError for an unknown method."""
    return tuple(parameters_of(method))


def checkpointed(method: str, file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that make a method, where it can, save its state and go on from it."""
    return ({"checkpoint": file} if "checkpoint" in settings_of(method) else {}) | settings


def parameters_of(method: str) -> dict[str, inspect.Parameter]:
    """The settings that a method takes, with annotations and defaults.

    Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r}: expected one of {', '.join(METHODS)}."
            f"{did_you_mean(method, METHODS)}"
        )
    parameters = inspect.signature(METHODS[method], eval_str=True).parameters
    named = {name: p for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    if len(named) < len(parameters):  # the rest are those of what it calls
        callee = EdgePruner if method in TRAINED else _SHARED.get(method, scores_along)
        inherited = dict(inspect.signature(callee, eval_str=True).parameters)
        if method in TRAINED:
            fit = inspect.signature(EdgePruner.fit, eval_str=True).parameters
            inherited["resume"] = fit["resume"]
        skip = {"path", "score", "method", "metadata", "magnitudes", "by_magnitude"}
        skip |= {*_SET.get(method, ())}
        named |= {name: p for name, p in inherited.items() if name not in (*named, *skip)}
    return {name: p for name, p in named.items() if name not in ("model", "task")}
