"""What a block computes for nothing while its edges are masked, left out.

A masked run hands queries, keys, values and heads' outputs over by itself
(`forward/masked_model.py`). So a block's own first norm, its own query, key and value projections
and its output projection give what is overwritten or unread. In this file they give their input or
zeros in place of it: in the package's own runs, and never where the user calls the model, whose
hooks and caches would see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

# An object, the name of one of its methods, and what stands in for it.
StandIn = tuple[Any, str, Callable[..., Any]]


def idle_projections(attention: Any, names: Sequence[str] = "qkv") -> list[StandIn]:
    """Zeros for a Bridge's linear maps of these names ("q", "k", "v", "o")."""
    modules = getattr(attention, "_modules", {})
    originals = [getattr(modules.get(name), "original_component", None) for name in names]
    widths = [(module, _width(module)) for module in originals]
    return [(m, "forward", _zeros_of(width)) for m, width in widths if width is not None]


def _width(module: Any) -> int | None:
    """How many numbers a linear map gives; None for any other module."""
    if isinstance(module, torch.nn.Linear):
        return int(module.out_features)
    return int(module.nf) if type(module).__name__ == "Conv1D" else None  # transformers' GPT-2


def idle_work(block: Any, *, norm_precedes: bool, parallel: bool) -> list[StandIn]:
    """Stand-ins for all that a block computes for nothing in a masked run.

    `norm_precedes`: whether ln1 comes before attention. In a `parallel` block the MLP may read it.
    """
    attention = block.attn
    idle = idle_projections(attention, "qkvo") or _idle_hooked(attention)
    norm = getattr(block, "_modules", {}).get("ln1")
    if idle and norm is not None and norm_precedes and not parallel:
        idle.append((norm, "forward", lambda x: x))
    return idle


@contextmanager
def resting(stand_ins: Sequence[StandIn]) -> Iterator[None]:
    """Every stand-in in its method's place, in this context."""
    with ExitStack() as undo:
        for owner, name, function in stand_ins:
            undo.enter_context(replaced(owner, name, function))
        yield


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The object with another method of this name, in this context."""
    own: dict[str, Any] = owner.__dict__
    had, before = name in own, own.get(name)
    own[name] = function
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            del own[name]


def _idle_hooked(attention: Any) -> list[StandIn]:
    """Zeros for the queries, keys and values of a HookedTransformer's attention without groups."""
    cfg = getattr(attention, "cfg", None)
    method = "calculate_qkv_matrices"
    plain = type(attention).__name__ == "Attention" and hasattr(attention, method)
    if not plain or cfg is None or getattr(cfg, "use_qk_norm", False):
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
