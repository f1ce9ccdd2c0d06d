"""Hooks and flags on the model inside a context; on leaving, the model is as it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from tl_edgeprune.hooks.modules import all_parameters
from tl_edgeprune.hooks.sites import Sites

Hook = tuple[str, Callable[..., Tensor | None]]
LIBRARIES = ("transformer_lens", "tl_edgeprune")


def refuse_conflicts(model: Any, sites: Sites) -> None:
    """Raise ValueError if a mask would silently overrule hooks or flags of the user."""
    if getattr(model.cfg, "use_attn_in", False):
        raise ValueError(
            "use_attn_in is on: it feeds queries, keys and values from one shared input, which "
            "edge masks split. Call model.set_use_attn_in(False) first."
        )
    points = sites.overwritten(model)
    if any(origin.startswith("tl_edgeprune") for p in points.values() for origin in _origins(p)):
        raise ValueError("the model is masked already: leave that context before entering another.")
    refuse_hooks(points)


def refuse_hooks(points: Mapping[str, Any], *, inside: bool = False) -> None:
    """Raise ValueError if one of these points, by name, has a hook of the user.

    `inside`: the mask's hooks are attached too.
    """
    with_user_hooks = [
        name
        for name, point in points.items()
        if not all(origin.startswith(LIBRARIES) for origin in _origins(point))
    ]
    if with_user_hooks:
        how = "(model.reset_hooks(including_permanent=True) removes all)."
        names = ", ".join(with_user_hooks[:4]) + (" …" if len(with_user_hooks) > 4 else "")
        if inside:
            how = "after leaving masked: reset_hooks inside removes the mask's own hooks too."
        raise ValueError(
            f"hooks of your own on {names}: edge masks overwrite what flows there, so those hooks "
            f"would be lost. Remove them first {how} To read there, use model.run_with_cache "
            "inside masked."
        )


def _origins(point: Any) -> list[str]:
    """The modules that the hooks on a point come from."""
    functions = [getattr(handle, "user_hook", None) for handle in point.fwd_hooks + point.bwd_hooks]
    return [getattr(getattr(f, "func", f), "__module__", None) or "" for f in functions]


@contextmanager
def hooks_attached(model: Any, hooks: Sequence[Hook]) -> Iterator[None]:
    """Inside this context the model has these forward hooks, besides those it has."""
    points = model.hook_dict
    with ExitStack() as undo:
        for name, function in hooks:
            point = points[name]
            point.add_hook(function)
            undo.callback(_remove, point, point.fwd_hooks[-1])
        yield


def _remove(point: Any, handle: Any) -> None:
    handle.hook.remove()
    point.fwd_hooks[:] = [h for h in point.fwd_hooks if h is not handle]


@contextmanager
def model_prepared(model: Any, sites: Sites) -> Iterator[None]:
    """Inside this context the model has frozen weights and the flags that the sites need."""
    with ExitStack() as undo:
        for flag, value in _flags(sites):
            previous = bool(getattr(model.cfg, flag, False))
            if previous != value:
                undo.callback(getattr(model, f"set_{flag}"), previous)
                getattr(model, f"set_{flag}")(value)
        for parameter in all_parameters(model):
            if parameter.requires_grad:
                undo.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        yield


def _flags(sites: Sites) -> list[tuple[str, bool]]:
    # Both classes' split inputs and per-head results cost memory, and nothing reads their points.
    flags = [("use_split_qkv_input", False), ("use_attn_result", False)]
    flags += [("ungroup_grouped_query_attention", False)]
    if any(site.read.endswith("hook_mlp_in") for site in sites.mlp):
        flags.append(("use_hook_mlp_in", True))
    return flags
