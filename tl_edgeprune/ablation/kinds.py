"""Ablations by name: what a removed edge carries.

An ablation is one record, made where its reference is built: `@register("zero", "…")`. Checks,
error texts and `tl-edgeprune ablations` are made from the records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor

from tl_edgeprune.ablation.constants import OPTIMAL, Ablation, Constants
from tl_edgeprune.ablation.fixed import mean_reference, zero_reference
from tl_edgeprune.ablation.recording import record
from tl_edgeprune.ablation.reference import ZERO_WITH_BIASES, Reference
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.sites import Sites

COUNTERFACTUAL = "counterfactual"
Needs = Literal["corrupted", "prompts"]
Build = Callable[[Any, Sites, EdgeGraph, Any], Reference]
"""(model, sites, graph, prompts) -> the reference; prompts: what the ablation needs, or None."""


@dataclass(frozen=True)
class AblationKind:
    """An ablation: its name, its help in a line, what its reference is built from, and how.

    needs: "corrupted" for a reference of each batch's corrupted prompts, "prompts" for one
    reference of all prompts, None for one without any run.
    """

    name: str
    help: str
    needs: Needs | None
    build: Build


ABLATIONS: dict[str, AblationKind] = {}


def register(
    name: str, help: str, *, needs: Literal["prompts"] | None = None
) -> Callable[[Build], Build]:
    """Decorator: make `build(model, sites, graph, prompts) -> Reference` an ablation by name.

    Args:
        name: what `ablation=name` and --ablation take.
        help: what a removed edge carries, in a line.
        needs: "prompts" for the task's corrupted prompts (rows of tokens, or a tensor
            [prompt, pos]), None for nothing; `prompts` is then None.

    Every prompt has the same reference: set its `any_batch`, and `any_position` if all positions
    have. Raises ValueError if the name is taken.
    """
    return partial(_add, name, help, needs)


def _add(name: str, help: str, needs: Needs | None, build: Build) -> Build:
    if name in ABLATIONS or name == OPTIMAL:
        raise ValueError(f"an ablation called {name!r} is registered already: choose another name.")
    ABLATIONS[name] = AblationKind(name, help, needs, build)
    return build


def check_ablation(kind: Ablation) -> None:
    """Raise ValueError for an unknown name, TypeError for anything but a name or Constants."""
    names = ", ".join(ABLATIONS)
    if not isinstance(kind, str | Constants):
        raise TypeError(f"ablation={kind!r:.100}: expected one of {names}, or Constants.")
    if kind == OPTIMAL:
        raise ValueError(
            "ablation='optimal' needs the constants that were learned: give ablation=constants, "
            "from optimal_constants(model, task, circuit), from EdgePruner(ablation='optimal'), as "
            "result.constants, or from Constants.load(path)."
        )
    if isinstance(kind, str) and kind not in ABLATIONS:
        raise ValueError(f"unknown ablation {kind!r}: expected one of {names}, or Constants.")


# ----------------------------------------------------------------------------------- the ablations


def _counterfactual(
    model: Any, sites: Sites, graph: EdgeGraph, corrupted: Int[Tensor, "batch pos"]
) -> Reference:
    no_positions = corrupted.new_empty((len(corrupted), 0))  # no logits
    return record(model, sites, graph, corrupted, no_positions)[0]


_add(COUNTERFACTUAL, "its source's output on the corrupted prompt", "corrupted", _counterfactual)


@register("zero", "nothing; the output biases of attention stay")
def _zero(model: Any, sites: Sites, graph: EdgeGraph, prompts: Any) -> Reference:
    return zero_reference(sites, graph, sites.attention[0].output)


@register(ZERO_WITH_BIASES, "nothing, nor the head's share of the output bias (published code)")
def _zero_with_biases(model: Any, sites: Sites, graph: EdgeGraph, prompts: Any) -> Reference:
    return zero_reference(sites, graph, sites.attention[0].output, bias_in_heads=True)


@register("mean", "its source's mean output over prompts and positions", needs="prompts")
def _mean(model: Any, sites: Sites, graph: EdgeGraph, prompts: Any) -> Reference:
    return mean_reference(model, sites, graph, prompts, positional=False)


@register(
    "mean-positional", "its source's mean output over prompts at the same position", needs="prompts"
)
def _mean_positional(model: Any, sites: Sites, graph: EdgeGraph, prompts: Any) -> Reference:
    return mean_reference(model, sites, graph, prompts, positional=True)
