"""Finds the sites of a HookedTransformer or a TransformerBridge.

Both classes' attention is read in `_attention_site`; the finders at the end of the file say which
norms stand around it and where the MLP reads, in each class.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks import shards
from tl_edgeprune.hooks.modules import model_kind
from tl_edgeprune.hooks.norms import Norm, identity, norm_function, weight_is_offset
from tl_edgeprune.hooks.sites import AttentionSite, MlpSite, PostNorm, Sites
from tl_edgeprune.hooks.unsupported import refuse_unsupported


def graph_of(model: Any, *, split_qkv: bool = True, split_embeddings: bool = False) -> EdgeGraph:
    """The edge graph of a HookedTransformer or TransformerBridge: `EdgeGraph.from_model`."""
    return find_sites(model).graph(split_qkv=split_qkv, split_embeddings=split_embeddings)


def find_sites(model: Any) -> Sites:
    """The sites of a HookedTransformer or a TransformerBridge.

    Raises:
        TypeError: for any other object.
        NotImplementedError: for a model whose residual stream does not split into heads and MLPs;
            the message names the part.
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
    attention = tuple(
        shards.sites_of_sharded_layer(model, layer, find_attention) for layer in layers
    )
    names = tuple(f"blocks.{layer}" for layer in layers)
    sites = Sites(
        blocks=names,
        attention=attention,
        mlp=tuple(find_mlp(model, layer) for layer in with_mlp),
        embed="hook_embed",
        final=f"{names[-1]}.hook_resid_post",
        cut=None if kind == "hooked" else "unembed.hook_in",
        parallel=bool(getattr(model.cfg, "parallel_attn_mlp", False)),
        # The Bridge has the hook point even without learned positions.
        has_positions=hasattr(model, "pos_embed") and not _is_shortformer(model),
        n_kv_heads=attention[0].weights[1].shape[0],
    )
    _check_one_shape(sites)
    return sites


def hidden_points(model: Any, sites: Sites) -> tuple[str, ...]:
    """The hook points of each MLP's hidden neurons, which its output weights read.

    Raises NotImplementedError, naming the part, for an MLP without such a point (experts).
    """
    point = "hook_post" if model_kind(model) == "hooked" else "out.hook_in"
    names = tuple(f"{block}.mlp.{point}" for block in sites.blocks)
    points = model.hook_dict
    missing = [layer for layer, name in enumerate(names) if name not in points]
    if missing:
        label = type(model.blocks[missing[0]].mlp).__name__
        raise NotImplementedError(
            f"{getattr(model.cfg, 'model_name', 'this model')}: blocks.{missing[0]}.mlp ({label}) "
            "has no single layer of hidden neurons (a mixture of experts has one per expert), so "
            "neurons='mlp' is not supported. Use neurons='dimensions'."
        )
    return names


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
    points = model.hook_dict  # the Bridge builds it at each access
    missing = [h for h in "qkvz" if f"{prefix}.hook_{h}" not in points]
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
    """The input width of the output projection, from the wrapped module if there is one."""
    original = getattr(getattr(attention, "o", None), "original_component", None)
    weight = getattr(original, "weight", output)
    return weight.numel() // output.shape[-1]


def _post_norm(module: Any) -> PostNorm:
    """The root-mean-square norm over attention's output.

    Raises NotImplementedError for any other norm.
    """
    original = getattr(module, "original_component", None) or module
    if "RMS" not in type(original).__name__:
        raise NotImplementedError(
            f"{type(original).__name__} after attention: only RMS norms are supported there."
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
    """Whether ln1 and ln2 follow attention and MLP, and no norm precedes them (OLMo 2)."""
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
    # If hook_attn_out is a norm's output, that norm follows attention (OLMo 2, Gemma 2).
    output_module = block.hook_aliases.get("hook_attn_out", "").partition(".")[0]
    post = _post_norm(modules[output_module]) if output_module.startswith("ln") else None
    norm_precedes = "ln1" in modules and output_module != "ln1"
    norm = norm_function(modules["ln1"]) if norm_precedes else identity
    return _attention_site(model, layer, norm, post)


def _bridge_mlp(model: Any, layer: int) -> MlpSite:
    block, name = model.blocks[layer], f"blocks.{layer}"
    modules = block._modules
    write = f"{name}.hook_mlp_out"
    if "ln2" in modules or getattr(block, "mlp_reads_resid_directly", False):
        return MlpSite(read=f"{name}.hook_mlp_in", norm=identity, write=write)
    # Attention and MLP share one norm (GPT-J), so the hook replaces the MLP's normalised input.
    return MlpSite(read=f"{name}.mlp.hook_in", norm=norm_function(modules["ln1"]), write=write)
