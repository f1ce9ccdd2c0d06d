"""Hooks on the model for as long as a context lasts, and the model as it was after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from tl_edgeprune.hooks.modules import all_parameters
from tl_edgeprune.hooks.sites import Sites

Hook = tuple[str, Callable[..., Tensor | None]]
LIBRARIES = ("transformer_lens", "tl_edgeprune")


# --------------------------------------------------------------------------- attaching to the model


def refuse_conflicts(model: Any, sites: Sites) -> None:
    """Raise ValueError where the user's hooks or flags would be overruled without a word."""
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
    """Raise ValueError where one of these points, by name, has a hook of the user's own.

    `inside`: the mask's own hooks are there too.
    """
    taken = [
        name
        for name, point in points.items()
        if not all(origin.startswith(LIBRARIES) for origin in _origins(point))
    ]
    if taken:
        how = "(model.reset_hooks(including_permanent=True) removes all)."
        if inside:
            how = "after leaving masked: reset_hooks inside removes the mask's own hooks too."
        raise ValueError(
            f"hooks of your own on {', '.join(taken[:4])}{' …' if len(taken) > 4 else ''}: edge "
            "masks overwrite what flows there, so those hooks would be lost. Remove them first "
            f"{how} To read there, use model.run_with_cache inside masked."
        )


def _origins(point: Any) -> list[str]:
    """The modules that the hooks on a point come from."""
    functions = [getattr(handle, "user_hook", None) for handle in point.fwd_hooks + point.bwd_hooks]
    return [getattr(getattr(f, "func", f), "__module__", None) or "" for f in functions]


@contextmanager
def attached(model: Any, hooks: Sequence[Hook]) -> Iterator[None]:
    """The model with these forward hooks, and without them again on leaving, whatever happens."""
    points = model.hook_dict
    with ExitStack() as undo:
        for name, function in hooks:
            point = points[name]
            point.add_hook(function)
            undo.callback(_remove, point, point.fwd_hooks[-1])
        yield


def _remove(point: Any, handle: Any) -> None:
    handle.hook.remove()
    point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


@contextmanager
def prepared(model: Any, sites: Sites) -> Iterator[None]:
    """The model with frozen weights and the flags that the sites need; as before on leaving."""
    with ExitStack() as undo:
        for flag, value in _flags(sites):
            before = bool(getattr(model.cfg, flag, False))
            if before != value:
                undo.callback(getattr(model, f"set_{flag}"), before)
                getattr(model, f"set_{flag}")(value)
        for parameter in all_parameters(model):
            if parameter.requires_grad:
                undo.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        yield


def _flags(sites: Sites) -> list[tuple[str, bool]]:
    # Both classes' split inputs and per-head results cost memory, and their points go unread.
    flags = [("use_split_qkv_input", False), ("use_attn_result", False)]
    flags += [("ungroup_grouped_query_attention", False)]
    if any(site.read.endswith("hook_mlp_in") for site in sites.mlp):
        flags.append(("use_hook_mlp_in", True))
    return flags
