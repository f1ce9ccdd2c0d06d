"""Skips computations of a block whose results a masked pass ignores.

A masked run hands over queries, keys, values and heads' outputs itself (`forward/masked_model.py`).
So the results of a block's own first norm, of its query, key and value projections and of its
output projection are overwritten or unread. Here they are replaced by their input or by zeros: in
the package's own runs, and never if the user calls the model, whose hooks and caches would see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

# An object, the name of one of its methods, and the function that replaces it.
Replacement = tuple[Any, str, Callable[..., Any]]


def idle_projections(attention: Any, names: Sequence[str] = "qkv") -> list[Replacement]:
    """Zeros for a Bridge's linear maps of these names ("q", "k", "v", "o")."""
    modules = getattr(attention, "_modules", {})
    originals = [getattr(modules.get(name), "original_component", None) for name in names]
    widths = [(module, _width(module)) for module in originals]
    return [(m, "forward", _zeros_of(width)) for m, width in widths if width is not None]


def _width(module: Any) -> int | None:
    """The number of outputs of a linear map; None for any other module."""
    if isinstance(module, torch.nn.Linear):
        return int(module.out_features)
    return int(module.nf) if type(module).__name__ == "Conv1D" else None  # transformers' GPT-2


def idle_work(block: Any, *, norm_precedes: bool, parallel: bool) -> list[Replacement]:
    """Replacements for all of a block's computations that a masked run ignores.

    Args:
        norm_precedes: whether ln1 comes before attention.
        parallel: whether the MLP may read ln1's output too.
    """
    attention = block.attn
    replacements = idle_projections(attention, "qkvo") or _idle_hooked(attention)
    norm = getattr(block, "_modules", {}).get("ln1")
    if replacements and norm is not None and norm_precedes and not parallel:
        replacements.append((norm, "forward", lambda x: x))
    return replacements


@contextmanager
def skipping(replacements: Sequence[Replacement]) -> Iterator[None]:
    """Inside this context every replacement is in effect."""
    with ExitStack() as undo:
        for owner, name, function in replacements:
            undo.enter_context(replaced(owner, name, function))
        yield


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside this context the object has another method of this name."""
    attributes: dict[str, Any] = owner.__dict__
    overwritten = {name: attributes[name]} if name in attributes else {}
    attributes[name] = function
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(overwritten)


def _idle_hooked(attention: Any) -> list[Replacement]:
    """Zeros for the queries, keys and values of a HookedTransformer's attention without groups."""
    cfg = getattr(attention, "cfg", None)
    method = "calculate_qkv_matrices"
    ungrouped = type(attention).__name__ == "Attention" and hasattr(attention, method)
    if not ungrouped or cfg is None or getattr(cfg, "use_qk_norm", False):
        return []

    def zeros(*inputs: Tensor) -> tuple[Tensor, ...]:
        weights = attention.W_Q, attention.W_K, attention.W_V
        hooks = attention.hook_q, attention.hook_k, attention.hook_v
        return tuple(
            hook(x.new_zeros(1).expand(*x.shape[:2], w.shape[0], w.shape[2]))
            for hook, x, w in zip(hooks, inputs, weights, strict=True)
        )

    return [(attention, method, zeros)]


def _zeros_of(width: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_zeros(1).expand(*x.shape[:-1], width)
