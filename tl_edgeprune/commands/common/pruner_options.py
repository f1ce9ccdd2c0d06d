"""Options of `prune`, one for each of EdgePruner's settings.

Help and defaults are those of `training/settings.py`, repeated here so that --help needs no
PyTorch; a test holds the two equal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import typer

from tl_edgeprune.commands.common.values import parse_assignments, whole_path

Command = Callable[..., None]


class PrunerOption(NamedTuple):
    """The type of an option, its help as the setting has it, its default as text, and more help."""

    type: Any
    help: str
    default: str | None = None
    more: str = ""


FIELDS = list[str]  # NAME=VALUE, repeated
PRUNER_OPTIONS = {
    "n_edges": PrunerOption(int, "Edges to keep.", more="Optional if the controller has a target."),
    "steps": PrunerOption(int, "Training steps.", "200"),
    "lr": PrunerOption(float, "Learning rate of the edges' log alphas.", "0.2"),
    "batch_size": PrunerOption(int, "Pairs per forward pass.", "8"),
    "accumulate": PrunerOption(int, "Forward passes per step.", "1"),
    "ablation": PrunerOption(
        str,
        "What removed edges carry.",
        "counterfactual",
        "A name (tl-edgeprune ablations), optimal, or a file of constants (.safetensors).",
    ),
    "objective": PrunerOption(
        str,
        "What the circuit is trained to keep.",
        more="kl, mse, logit-diff, log-prob or prob-diff; by default the task's own.",
    ),
    "controller": PrunerOption(
        FIELDS,
        "How the masks are made sparse.",
        "exact-budget",
        "exact-budget, lagrangian or penalty, and NAME=VALUE for its fields; may be repeated.",
    ),
    "init_scores": PrunerOption(
        str, "Where log alphas start: mask-ig, a scores.safetensors, or none.", "mask-ig"
    ),
    "init_log_alpha": PrunerOption(
        tuple[float, float], "Mean and standard deviation of the first log alphas.", "0.0 1.0"
    ),
    "node_masks": PrunerOption(bool, "Also learn a mask for each source.", "no"),
    "node_controller": PrunerOption(FIELDS, "As --controller, for the node masks."),
    "optimizer": PrunerOption(
        FIELDS,
        "Options of the optimizer.",
        more="NAME=VALUE of Optimizer, such as warmup=20; may be repeated.",
    ),
    "attachment": PrunerOption(float, "Weight of the penalty on badly connected edges."),
    "hard_share": PrunerOption(
        float, "Final fraction of the run that keeps exactly the top edges.", "0.4"
    ),
    "average_share": PrunerOption(
        float, "Final fraction of the run whose log alphas are averaged for the ranking.", "0.0"
    ),
    "candidates": PrunerOption(
        int, "Rankings evaluated late in the run; the best one is kept.", "10"
    ),
    "split_qkv": PrunerOption(bool, "Separate edges into queries, keys and values.", "yes"),
    "split_embeddings": PrunerOption(bool, "Token and position embeddings as two sources.", "no"),
    "positions": PrunerOption(str, "span or position: a mask on every edge in each of them."),
    "neurons": PrunerOption(
        str, "mlp or dimensions: also learn a gate for each neuron of that kind."
    ),
    "n_neurons": PrunerOption(int, "Neurons to keep, with --neurons."),
    "neuron_controller": PrunerOption(FIELDS, "As --controller, for the neurons."),
    "bias_in_heads": PrunerOption(
        bool, "Zero ablation also removes each head's share of b_O.", "no"
    ),
    "recompute": PrunerOption(
        bool, "Recompute blocks in the backward pass, to use far less memory."
    ),
    "checkpoint_every": PrunerOption(int, "Steps between checkpoints.", "25"),
}


def with_pruner_options(after: str) -> Callable[[Command], Command]:
    """Decorator: put the options in place of the command's `**settings`, after this one."""

    def add(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD:
                parameters.append(parameter)
            if parameter.name == after:
                parameters += [_parameter(*each) for each in PRUNER_OPTIONS.items()]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return add


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, in plain words and numbers, with whole paths."""
    settings = {}
    for name, value in options.items():
        if value is None or value == []:
            continue
        if PRUNER_OPTIONS[name].type is FIELDS:
            value = _fields(f"--{name.replace('_', '-')}", value)
        elif isinstance(value, tuple):
            value = list(value)
        settings[name] = whole_path(value) if isinstance(value, str) else value
    return settings


def _parameter(name: str, option: PrunerOption) -> inspect.Parameter:
    flag = ["--recompute"] if name == "recompute" else []  # without --no-recompute
    text = f"{option.help} {option.more}".strip()
    shown = typer.Option(*flag, help=text, show_default=option.default or False)
    annotation = Annotated[option.type | None, shown]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, default=None, annotation=annotation)


def _fields(option: str, texts: list[str]) -> dict[str, Any]:
    """Fields by name; a word without "=" is the kind."""
    return parse_assignments(option, [text if "=" in text else f"kind={text}" for text in texts])
