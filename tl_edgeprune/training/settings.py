"""EdgePruner's settings, each declared once: its default, its help, its kind and its bounds.

The checks, the options of `tl-edgeprune prune` and the settings that a run saves are generated from
these declarations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tl_edgeprune.ablation.constants import OPTIMAL, Ablation
from tl_edgeprune.ablation.kinds import check_ablation
from tl_edgeprune.ablation.reference import ZERO_WITH_BIASES
from tl_edgeprune.circuits.neurons import check_kind
from tl_edgeprune.circuits.scores import EdgeScores
from tl_edgeprune.forward.neuron_gates import check_constants
from tl_edgeprune.objectives import Objective
from tl_edgeprune.runs.fingerprint import digest, of_setting
from tl_edgeprune.runs.task_checks import check_positions
from tl_edgeprune.training.controllers import Controller, ExactBudget
from tl_edgeprune.training.gates import sample_gates
from tl_edgeprune.training.regularisers import Attachment

Sampler = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Optimizer:
    """How log alphas are learned: AdamW, whose options these are.

    Args:
        betas, weight_decay: as in torch.optim.AdamW.
        clip: the largest norm of a gradient, or None.
        warmup: steps in which the learning rates rise linearly from 0.
        decay: whether the learning rates then fall linearly to 0.
        controller_lr: learning rate of a Lagrangian's multipliers.
        constants_lr: learning rate of the constants of ablation="optimal", in units of the root
            mean square of their sources.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float | None = None
    warmup: int = 0
    decay: bool = False
    controller_lr: float = 0.3
    constants_lr: float = 0.05

    def rate(self, step: int, steps: int) -> float:
        """The factor on the learning rates at this step of a run of `steps`."""
        if step < self.warmup:
            return step / max(1, self.warmup)
        if self.decay:
            return max(0.0, (steps - step) / max(1, steps - self.warmup))
        return 1.0


# ------------------------------------------------------------------------------ what a setting is


class Kind(NamedTuple):
    """The values that a setting may have: in words, and as a test."""

    expected: str
    fits: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_a(*classes: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, classes) and not isinstance(value, type)


ANY = Kind("anything", lambda value: True)
WHOLE = Kind("a whole number", _is_whole)
WHOLE_OR_NONE = Kind("a whole number, or None", lambda v: v is None or _is_whole(v))
NUMBER = Kind("a number", _is_number)
CONTROLLER = Kind("ExactBudget(…), Lagrangian(…) or Penalty(…)", _is_a(Controller, type(None)))
OPTIMIZER = Kind("an Optimizer(…) of tl_edgeprune", lambda value: hasattr(value, "betas"))
ATTACHMENT = Kind("Attachment(weight), or None", _is_a(Attachment, type(None)))
DTYPE = Kind("a dtype such as torch.bfloat16, or None", _is_a(torch.dtype, type(None)))
START = Kind("'mask-ig', EdgeScores, a tensor or None", _is_a(str, EdgeScores, Tensor, type(None)))


def setting(
    default: Any,
    help: str,
    kind: Kind = ANY,
    *,
    least: int | None = None,
    share: bool = False,
    saved: bool = True,
) -> Any:
    """A field of PrunerSettings.

    Args:
        default: its default value.
        help: one line of help, for the command line.
        kind: the values that it may have.
        least: its smallest value, if it is a number with one.
        share: whether it is a share, from 0 to 1.
        saved: whether a run saves it and is resumed only with the same value.
    """
    return field(
        default=default,
        metadata={"help": help, "kind": kind, "least": least, "share": share, "saved": saved},
    )


# ------------------------------------------------------------------------------------ the settings


@dataclass(eq=False, repr=False)
class PrunerSettings:
    """The settings of an EdgePruner, checked and with their defaults filled in.

    The annotations are those of the attributes. As arguments, `lr`, `controller`, `optimizer` and
    `average_share` may also be None, for defaults that depend on the other settings.

    Raises ValueError for settings that cannot work and TypeError for values of another kind.
    """

    n_edges: int | None = setting(None, "Edges to keep.", WHOLE_OR_NONE)
    _: KW_ONLY
    steps: int = setting(200, "Training steps.", WHOLE, least=1)
    lr: float = setting(None, "Learning rate of the edges' log alphas.", NUMBER)
    batch_size: int = setting(8, "Pairs per forward pass.", WHOLE, least=1)
    accumulate: int = setting(1, "Forward passes per step.", WHOLE, least=1)
    ablation: Ablation = setting("counterfactual", "What removed edges carry.")
    objective: str | Objective | None = setting(None, "What the circuit is trained to keep.")
    controller: Controller = setting(None, "How the masks are made sparse.", CONTROLLER)
    init_scores: str | EdgeScores | Tensor | None = setting(
        "mask-ig", "Where log alphas start: mask-ig, a scores.safetensors, or none.", START
    )
    init_log_alpha: tuple[float, float] = setting(
        (0.0, 1.0), "Mean and standard deviation of the first log alphas."
    )
    node_masks: bool = setting(False, "Also learn a mask for each source.")
    node_controller: Controller | None = setting(
        None, "As --controller, for the node masks.", CONTROLLER
    )
    optimizer: Optimizer = setting(None, "Options of the optimizer.", OPTIMIZER)
    sampler: Sampler = setting(sample_gates, "Draws a mask from log alphas.")
    attachment: Attachment | None = setting(
        None, "Weight of the penalty on badly connected edges.", ATTACHMENT
    )
    hard_share: float = setting(
        0.4, "Final fraction of the run that keeps exactly the top edges.", NUMBER, share=True
    )
    average_share: float = setting(
        None,
        "Final fraction of the run whose log alphas are averaged for the ranking.",
        NUMBER,
        share=True,
    )
    candidates: int = setting(
        10, "Rankings evaluated late in the run; the best one is kept.", WHOLE, least=0
    )
    split_qkv: bool = setting(True, "Separate edges into queries, keys and values.")
    split_embeddings: bool = setting(False, "Token and position embeddings as two sources.")
    positions: str | None = setting(None, "span or position: a mask on every edge in each of them.")
    neurons: str | None = setting(
        None, "mlp or dimensions: also learn a gate for each neuron of that kind."
    )
    n_neurons: int | None = setting(None, "Neurons to keep, with --neurons.", WHOLE_OR_NONE)
    neuron_controller: Controller | None = setting(
        None, "As --controller, for the neurons.", CONTROLLER
    )
    bias_in_heads: bool = setting(False, "Zero ablation also removes each head's share of b_O.")
    recompute: bool = setting(
        False, "Recompute blocks in the backward pass, to use far less memory."
    )
    dtype: torch.dtype | None = setting(None, "Of weights and activations.", DTYPE)
    device: torch.device | str | None = setting(None, "Where the run takes place.")
    seed: int = setting(0, "Of the training: same seed, same machine, same bits.", WHOLE)
    checkpoint: str | Path | None = setting(None, "Where the run's state is saved.", saved=False)
    checkpoint_every: int = setting(25, "Steps between checkpoints.", WHOLE, least=1, saved=False)
    progress: bool = setting(True, "Show a progress bar.", saved=False)

    def __post_init__(self) -> None:
        if self.bias_in_heads and self.ablation == "zero":
            self.ablation = ZERO_WITH_BIASES
        self.controller = self.controller or default_budget(self.n_edges)
        self.optimizer = self.optimizer or Optimizer()
        if self.n_edges is None and not isinstance(self.controller, ExactBudget):
            self.hard_share = 0.0  # without a budget no size is known
        sampled = getattr(self.controller, "schedule", None) == "sampled"
        if self.lr is None:
            self.lr = 0.3 if sampled else 0.2
        if self.average_share is None:
            self.average_share = 0.6 if sampled else 0.0
        if self.neurons is not None and self.neuron_controller is None:
            self.neuron_controller = default_budget(self.n_neurons)
        self._check()

    def settings(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        saved = [f.name for f in fields(self) if f.metadata["saved"]]
        values = {name: of_setting(getattr(self, name)) for name in saved}
        values["init_scores"] = _plain_scores(self.init_scores)
        values["objective"], values["sampler"] = _named(self.objective), _named(self.sampler)
        return values

    # -------------------------------------------------------------------------------------- checks

    def _check(self) -> None:
        check_values(vars(self))
        if self.n_edges is not None and self.n_edges < 1:
            raise ValueError(f"n_edges={self.n_edges}: a circuit needs at least one edge.")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: expected a number above 0.")
        if self.ablation != OPTIMAL:
            check_ablation(self.ablation)
        if self.checkpoint is not None and Path(self.checkpoint).is_dir():
            raise ValueError(f"checkpoint={str(self.checkpoint)!r} is a folder: give a file in it.")
        if isinstance(self.init_scores, str) and self.init_scores != "mask-ig":
            raise ValueError(
                f"init_scores={self.init_scores!r}: expected 'mask-ig', EdgeScores, a tensor or "
                "None."
            )
        check_positions(self.positions)
        if self.positions is not None and self.recompute:
            raise ValueError(
                f"positions={self.positions!r} with recompute=True is not supported: recomputed "
                "blocks have one mask for all positions. Omit one of the two."
            )
        if self.node_controller is not None and not self.node_masks:
            raise ValueError("node_controller needs node_masks=True.")
        self._check_neurons()

    def _check_neurons(self) -> None:
        check_kind(self.neurons)
        if self.neurons is None:
            if self.n_neurons is not None or self.neuron_controller is not None:
                raise ValueError(
                    "n_neurons and neuron_controller need neurons='mlp' or 'dimensions'."
                )
            return
        if self.n_neurons is not None and self.n_neurons < 1:
            raise ValueError(f"n_neurons={self.n_neurons}: expected at least one neuron, or None.")
        assert self.neuron_controller is not None
        try:
            copy.deepcopy(self.neuron_controller).start(2, self.n_neurons and 1)
        except ValueError as error:
            raise ValueError(f"neuron_controller without n_neurons: {error}") from None
        if self.recompute:
            raise ValueError(
                f"neurons={self.neurons!r} with recompute=True is not supported: recomputed blocks "
                "take no gates on neurons. Omit one of the two."
            )
        check_constants(self.neurons, self.ablation)


def check_values(settings: dict[str, Any]) -> None:
    """Check that each setting is of its kind and within its bounds.

    Raises TypeError for a value of another kind, ValueError for a number out of bounds.
    """
    for declared in fields(PrunerSettings):
        name, value, rules = declared.name, settings[declared.name], declared.metadata
        if not rules["kind"].fits(value):
            raise TypeError(f"{name}={value!r:.100}: expected {rules['kind'].expected}.")
        if rules["kind"] is NUMBER and math.isinf(value):
            raise ValueError(f"{name}={value}: expected a finite number.")
        if rules["least"] is not None and value < rules["least"]:
            raise ValueError(f"{name}={value}: expected {rules['least']} or more.")
        if rules["share"] and not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: expected a share from 0 to 1.")


def default_budget(size: int | None) -> ExactBudget:
    """The default controller for a size; for circuits of every size if it is None."""
    return ExactBudget("sampled", anneal=0.4) if size is None else ExactBudget()


def _plain_scores(scores: Any) -> Any:
    if isinstance(scores, EdgeScores):
        return {"scores": scores.metadata, "digest": digest(scores.tensor.tolist())}
    return digest(scores.tolist()) if isinstance(scores, Tensor) else scores


def _named(function: Callable[..., Any] | str | None) -> str | None:
    return getattr(function, "__name__", repr(function)) if callable(function) else function
