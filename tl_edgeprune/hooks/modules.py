"""A model's class, modules, parameters and dropout."""

from __future__ import annotations

from typing import Any

import torch

from tl_edgeprune.hooks.unsupported import refuse_class


def model_kind(model: Any) -> str:
    """ "hooked" or "bridge". Raises NotImplementedError for TransformerLens' other classes and
    TypeError for anything else.
    """
    refuse_class(model)
    names = {cls.__name__ for cls in type(model).__mro__}
    if "HookedTransformer" in names:
        return "hooked"
    if "TransformerBridge" in names:
        return "bridge"
    raise TypeError(
        f"expected a HookedTransformer or a TransformerBridge, got {type(model).__name__}. Wrap a "
        "transformers model with TransformerBridge.boot_transformers(name, hf_model=model)."
    )


def longest_prompt(model: Any) -> int | None:
    """The number of positions that the model has (learned ones, or a HookedTransformer's); None if
    the configuration's number is no hard limit.
    """
    kind = getattr(model.cfg, "positional_embedding_type", None)
    learned = kind == "standard" and hasattr(model, "pos_embed")
    if not (learned or (model_kind(model) == "hooked" and kind != "alibi")):
        return None
    n_ctx = getattr(model.cfg, "n_ctx", None)
    return None if n_ctx is None else int(n_ctx)


def is_folded(model: Any) -> bool:
    """Whether norms' weights were folded into the model's other weights, which changes what zero
    and mean ablation do.
    """
    return bool(
        getattr(model, "compatibility_mode", False)
        or str(getattr(model.cfg, "normalization_type", "")).endswith("Pre")
    )


def all_modules(model: Any) -> list[torch.nn.Module]:
    """Every module that runs, including those that the Bridge's module tree leaves out."""
    original = getattr(model, "original_model", None)
    wrapped = original.modules() if isinstance(original, torch.nn.Module) else ()
    return list(dict.fromkeys([*model.modules(), *wrapped]))


def all_parameters(model: Any) -> list[torch.nn.Parameter]:
    return [
        p for module in all_modules(model) for p in module._parameters.values() if p is not None
    ]


def dropouts(model: Any) -> list[torch.nn.Module]:
    """Modules that drop activations in training mode."""
    return [module for module in all_modules(model) if _drops(module)]


def _drops(module: torch.nn.Module) -> bool:
    """Whether a module is a dropout, or has a rate for a functional one (OPT's `dropout`)."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.p > 0
    rates = [value for name, value in vars(module).items() if "drop" in name]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
