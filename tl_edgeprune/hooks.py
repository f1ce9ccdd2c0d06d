"""Where a model's sources and destinations are: the only file that knows TransformerLens' classes.

A `Sites` names the hook points of one model and holds what the masked forward pass applies itself:
each block's attention norm and its query, key, value and output weights. Heads are read and written
after their projections, at `hook_q`, `hook_k`, `hook_v` and `hook_z`: those points exist on both
classes and for every attention, with or without TransformerLens' split inputs, and nothing of
[batch, pos, head, d_model] is copied for the model to normalise and project again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_edgeprune import shards
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.norms import Norm, identity, inverse_rms, norm_function, weight_is_offset
from tl_edgeprune.refusals import refuse_class, refuse_unsupported

Hook = tuple[str, Callable[..., Tensor | None]]
# Points of a block that lie on the model's own residual stream or before its projections: what
# hooks do there goes unread under masks.
LOST = (
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_in", "hook_out"),
    *("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_out"),
    *("ln1.hook_in", "ln1.hook_scale", "ln1.hook_normalized", "ln1.hook_out", "hook_mlp_in"),
    *("attn.hook_in", "attn.q.hook_in", "attn.k.hook_in", "attn.v.hook_in"),
    *("attn.hook_result", "attn.o.hook_out", "attn.hook_out", "attn.hook_hidden_states"),
    *("ln1_post.hook_in", "ln1_post.hook_scale", "ln1_post.hook_normalized", "ln1_post.hook_out"),
)
LIBRARIES = ("transformer_lens", "tl_edgeprune")


@dataclass(frozen=True)
class PostNorm:
    """A root-mean-square norm over the summed heads (Gemma 2): y = o * scale(o) * gain."""

    gain: Float[Tensor, " d_model"]
    eps: float

    def scale(self, summed: Float[Tensor, "row d_model"]) -> Float[Tensor, "row 1"]:
        """The factor by which every head's output is scaled, at the heads' current sum."""
        return inverse_rms(summed.float() if summed.dtype != torch.float64 else summed, self.eps)


@dataclass(frozen=True)
class AttentionSite:
    """One layer's attention. Weights: q, k, v as [head, d_model, d_head], output [head, d_head,
    d_model].
    """

    q: str
    k: str
    v: str
    z: str
    norm: Norm
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    output: Float[Tensor, "head d_head d_model"]
    output_bias: Float[Tensor, " d_model"] | None
    post: PostNorm | None
    positions: Float[Tensor, "ctx d_model"] | None = None  # shortformer's, for queries and keys

    def placed(
        self, part: int, x: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries (part 0), keys (1) or values (2) with their positions, where attention itself
        adds those to the normalised input (shortformer).
        """
        if self.positions is None or part == 2:
            return x
        places = self.positions[: x.shape[1]].unsqueeze(0)  # [1, pos, d_model]
        return x + (places @ self.weights[part]).transpose(0, 1)

    def scaled(self, z: Float[Tensor, "row head d_head"]) -> Float[Tensor, "row head d_head"]:
        """z, times the post-norm's scale where there is one: heads' outputs are then linear in
        it.
        """
        if self.post is None:
            return z
        summed = z.flatten(1) @ self.output.flatten(0, 1)
        return z * self.post.scale(summed).unsqueeze(-1).to(z.dtype)

    @property
    def gain(self) -> Float[Tensor, " d_model"] | None:
        return None if self.post is None else self.post.gain


@dataclass(frozen=True)
class MlpSite:
    """One layer's MLP: where it reads, the norm that we must apply there (if any), where it
    writes.
    """

    read: str
    norm: Norm
    write: str


@dataclass(frozen=True)
class Sites:
    """Every hook point that the masked forward pass uses, in one model."""

    blocks: tuple[str, ...]
    attention: tuple[AttentionSite, ...]
    mlp: tuple[MlpSite, ...]
    embed: str
    final: str
    cut: str | None
    parallel: bool
    has_positions: bool
    n_kv_heads: int
    hidden: tuple[str, ...] = ()  # where W_out reads, in runs with gates on the MLPs' neurons

    def graph(self, *, split_qkv: bool, split_embeddings: bool) -> EdgeGraph:
        """The model's edge graph with these options."""
        if split_embeddings and not self.has_positions:
            raise ValueError(
                "split_embeddings=True needs learned position embeddings, but this model has only "
                "token embeddings (positions enter inside attention). Use split_embeddings=False."
            )
        return EdgeGraph(
            n_layers=len(self.blocks),
            n_heads=self.attention[0].output.shape[0],
            n_kv_heads=self.n_kv_heads,
            has_mlp=bool(self.mlp),
            parallel=self.parallel and bool(self.mlp),
            split_qkv=split_qkv,
            split_embeddings=split_embeddings,
        )

    def overwritten(self, model: Any) -> dict[str, Any]:
        """The hook points, by name, whose hooks the masked forward pass would overrule or lose."""
        names = {self.embed, self.final, self.cut}
        names |= {name for site in self.attention for name in (site.q, site.k, site.v, site.z)}
        names |= {name for site in self.mlp for name in (site.read, site.write)}
        names |= {f"{block}.{name}" for block in self.blocks for name in LOST}
        points = model.hook_dict.items()  # once: the Bridge makes it anew at each look
        return {name: point for name, point in points if name in names and name != self.embed}


# ------------------------------------------------------------------------------- finding the sites


def graph_of(model: Any, *, split_qkv: bool = True, split_embeddings: bool = False) -> EdgeGraph:
    """The edge graph of a HookedTransformer or TransformerBridge: `EdgeGraph.from_model`."""
    return find_sites(model).graph(split_qkv=split_qkv, split_embeddings=split_embeddings)


def find_sites(model: Any) -> Sites:
    """The sites of a HookedTransformer or a TransformerBridge.

    Raises TypeError for another object and NotImplementedError, naming the part, for a model whose
    residual stream does not split into heads and MLPs.
    """
    kind = model_kind(model)
    refuse_unsupported(model)
    blocks = list(model.blocks)
    find_attention = _hooked_attention if kind == "hooked" else _bridge_attention
    find_mlp = _hooked_mlp if kind == "hooked" else _bridge_mlp
    with_mlp = [layer for layer, block in enumerate(blocks) if hasattr(block, "mlp")]
    if with_mlp and len(with_mlp) != len(blocks):
        raise NotImplementedError("some blocks have an MLP and some have none: not supported.")
    layers = range(len(blocks))
    attention = tuple(shards.found(model, layer, find_attention) for layer in layers)
    names = tuple(f"blocks.{layer}" for layer in range(len(blocks)))
    sites = Sites(
        blocks=names,
        attention=attention,
        mlp=tuple(find_mlp(model, layer) for layer in with_mlp),
        embed="hook_embed",
        final=f"{names[-1]}.hook_resid_post",
        cut=None if kind == "hooked" else "unembed.hook_in",
        parallel=bool(getattr(model.cfg, "parallel_attn_mlp", False)),
        # The Bridge names the hook point anyway.
        has_positions=hasattr(model, "pos_embed") and not _is_shortformer(model),
        n_kv_heads=attention[0].weights[1].shape[0],
    )
    _check_one_shape(sites)
    return sites


def hidden_points(model: Any, sites: Sites) -> tuple[str, ...]:
    """The points of what each MLP's output weights read: its hidden neurons' activations.

    Raises NotImplementedError, naming the part, for an MLP without such a point (experts).
    """
    point = "hook_post" if model_kind(model) == "hooked" else "out.hook_in"
    names = tuple(f"{block}.mlp.{point}" for block in sites.blocks)
    known = model.hook_dict
    missing = [layer for layer, name in enumerate(names) if name not in known]
    if missing:
        label = type(model.blocks[missing[0]].mlp).__name__
        raise NotImplementedError(
            f"{getattr(model.cfg, 'model_name', 'this model')}: blocks.{missing[0]}.mlp ({label}) "
            "has no one layer of hidden neurons (a mixture of experts has one an expert), so "
            "neurons='mlp' is not supported. Use neurons='dimensions'."
        )
    return names


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
    """How many positions the model has, learned ones or a HookedTransformer's; None where the
    configuration's number is no hard limit.
    """
    kind = getattr(model.cfg, "positional_embedding_type", None)
    learned = kind == "standard" and hasattr(model, "pos_embed")
    if not (learned or (model_kind(model) == "hooked" and kind != "alibi")):
        return None
    n_ctx = getattr(model.cfg, "n_ctx", None)
    return None if n_ctx is None else int(n_ctx)


def is_folded(model: Any) -> bool:
    """Whether norms' weights were folded into the model's own: zero and mean ablation then
    differ.
    """
    return bool(
        getattr(model, "compatibility_mode", False)
        or str(getattr(model.cfg, "normalization_type", "")).endswith("Pre")
    )


def _check_one_shape(sites: Sites) -> None:
    shapes = {tuple(tuple(w.shape) for w in site.weights) for site in sites.attention}
    if len(shapes) > 1:
        raise NotImplementedError(
            f"layers of different attention shapes are not supported: {sorted(shapes)}"
        )


def _attention_site(model: Any, layer: int, norm: Norm, post: PostNorm | None) -> AttentionSite:
    attention = model.blocks[layer].attn
    prefix = f"blocks.{layer}.attn"
    try:
        # HookedTransformer's W_K repeats grouped keys; _W_K holds the group's own.
        weights = (
            attention.W_Q,
            attention._W_K if hasattr(attention, "_W_K") else attention.W_K,
            attention._W_V if hasattr(attention, "_W_V") else attention.W_V,
        )
        biases = (
            attention.b_Q,
            attention._b_K if hasattr(attention, "_b_K") else attention.b_K,
            attention._b_V if hasattr(attention, "_b_V") else attention.b_V,
        )
        output, output_bias = attention.W_O, attention.b_O
    except (AttributeError, TypeError, ValueError) as error:
        raise NotImplementedError(
            f"{prefix} ({type(attention).__name__}): its query, key, value and output weights "
            f"cannot be read per head ({error}), so its inputs cannot be masked."
        ) from error
    known = model.hook_dict  # built anew at each access on the Bridge
    missing = [h for h in "qkvz" if f"{prefix}.hook_{h}" not in known]
    if missing:
        raise NotImplementedError(
            f"{prefix} ({type(attention).__name__}) has no hook_{missing[0]}."
        )
    if post is not None and output_bias is not None and bool(output_bias.any()):
        raise NotImplementedError(f"{prefix}: an output bias under a norm belongs to no head.")
    if output.shape[0] * output.shape[1] != _output_width(attention, output):
        raise NotImplementedError(
            f"{prefix}: {output.shape[0]} heads of {output.shape[1]} do not make up its output "
            "weight's width: the configuration's head size is wrong for this model."
        )
    return AttentionSite(
        q=f"{prefix}.hook_q",
        k=f"{prefix}.hook_k",
        v=f"{prefix}.hook_v",
        z=f"{prefix}.hook_z",
        norm=norm,
        weights=tuple(w.detach() for w in weights),
        biases=tuple(None if b is None else b.detach() for b in biases),
        output=output.detach(),
        output_bias=None if output_bias is None else output_bias.detach(),
        post=post,
        positions=model.pos_embed.W_pos.detach() if _is_shortformer(model) else None,
    )


def _is_shortformer(model: Any) -> bool:
    return getattr(model.cfg, "positional_embedding_type", None) == "shortformer"


def _output_width(attention: Any, output: Tensor) -> int:
    """How many numbers the output projection takes in, by the module itself where there is one."""
    original = getattr(getattr(attention, "o", None), "original_component", None)
    weight = getattr(original, "weight", output)
    return weight.numel() // output.shape[-1]


def _post_norm(module: Any) -> PostNorm:
    """The parameters of a root-mean-square norm over attention's output."""
    original = getattr(module, "original_component", None) or module
    if "RMS" not in type(original).__name__:
        raise NotImplementedError(
            f"{type(original).__name__} after attention: only RMS norms are supported."
        )
    gain = module.weight if hasattr(module, "weight") else module.w
    eps = original.variance_epsilon if hasattr(original, "variance_epsilon") else original.eps
    offset = original is not module and weight_is_offset(module)
    return PostNorm(gain=(gain + 1.0 if offset else gain).detach(), eps=float(eps))


def _hooked_attention(model: Any, layer: int) -> AttentionSite:
    block = model.blocks[layer]
    if _hooked_norms_after(model):
        return _attention_site(model, layer, identity, _post_norm(block.ln1))
    post = _post_norm(block.ln1_post) if hasattr(block, "ln1_post") else None
    return _attention_site(model, layer, norm_function(block.ln1), post)


def _hooked_norms_after(model: Any) -> bool:
    """OLMo 2's layout: ln1 and ln2 follow attention and MLP, nothing precedes them."""
    try:
        from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
    except ImportError:
        return False
    return getattr(model.cfg, "original_architecture", None) in POST_NORM_ARCHITECTURES


def _hooked_mlp(model: Any, layer: int) -> MlpSite:
    block = f"blocks.{layer}"
    return MlpSite(read=f"{block}.hook_mlp_in", norm=identity, write=f"{block}.hook_mlp_out")


def _bridge_attention(model: Any, layer: int) -> AttentionSite:
    block = model.blocks[layer]
    modules = block._modules
    # Where hook_attn_out stands after a norm, that norm follows attention (OLMo 2, Gemma 2).
    after = block.hook_aliases.get("hook_attn_out", "").partition(".")[0]
    post = _post_norm(modules[after]) if after.startswith("ln") else None
    before = "ln1" in modules and after != "ln1"
    return _attention_site(
        model, layer, norm_function(modules["ln1"]) if before else identity, post
    )


def _bridge_mlp(model: Any, layer: int) -> MlpSite:
    block, name = model.blocks[layer], f"blocks.{layer}"
    modules = block._modules
    write = f"{name}.hook_mlp_out"
    if "ln2" in modules or getattr(block, "mlp_reads_resid_directly", False):
        return MlpSite(read=f"{name}.hook_mlp_in", norm=identity, write=write)
    # One norm for attention and MLP (GPT-J): the MLP is handed its normalised input.
    return MlpSite(read=f"{name}.mlp.hook_in", norm=norm_function(modules["ln1"]), write=write)


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


def all_modules(model: Any) -> list[torch.nn.Module]:
    """Every module that runs, also those that the Bridge's own tree leaves out."""
    original = getattr(model, "original_model", None)
    both = [
        *model.modules(),
        *(original.modules() if isinstance(original, torch.nn.Module) else ()),
    ]
    return list(dict.fromkeys(both))


def all_parameters(model: Any) -> list[torch.nn.Parameter]:
    return [
        p for module in all_modules(model) for p in module._parameters.values() if p is not None
    ]


def dropouts(model: Any) -> list[torch.nn.Module]:
    """Modules that drop activations when they are in training mode."""
    return [module for module in all_modules(model) if _drops(module)]


def _drops(module: torch.nn.Module) -> bool:
    """Whether it is a dropout, or holds a rate for a functional one (OPT's `dropout`)."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.p > 0
    rates = [value for name, value in vars(module).items() if "drop" in name]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
