"""Checks of a call to a masked model: what the model's own forward accepts and masks do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_edgeprune.graph.edge_graph import EdgeGraph

GENERATORS = ("generate", "generate_stream", "hf_generate", "diffusion_generate")
REFUSED_ARGUMENTS = {
    "past_kv_cache": "a KV cache",
    "past_key_values": "a KV cache",
    "start_at_layer": "start_at_layer",
    "stop_at_layer": "stop_at_layer",
    "inputs_embeds": "inputs_embeds",
    "pixel_values": "pixel_values",
    "shortformer_pos_embed": "shortformer position embeddings",
    "position_ids": "position_ids",
}


def check_call(
    model: Any, tokens: Any, arguments: Mapping[str, Any], *, some_positions: bool
) -> Int[Tensor, "batch pos"]:
    """The tokens of a call with these named arguments.

    Args:
        some_positions: whether the logits are computed at some positions only.

    Raises ValueError for anything but tokens [batch, pos] without padding, for arguments that a
    masked run does not support, and for a loss without the logits at every position.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        given = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"expected tokens [batch, pos] inside masked, got {given}: use model.to_tokens first."
        )
    for name, label in REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(
                f"{label} is not supported inside masked: run whole prompts, from tokens."
            )
    if arguments.get("use_cache"):
        raise ValueError("a KV cache is not supported inside masked: run with use_cache=False.")
    padding = arguments.get("attention_mask")
    if padding is not None and not bool(torch.as_tensor(padding).bool().all()):
        raise ValueError(
            "padding masks are not supported inside masked: give prompts of one length per batch."
        )
    _refuse_left_padding(model, tokens)
    loss = arguments.get("labels") is not None or arguments.get("return_type") in ("loss", "both")
    if loss and some_positions:
        raise ValueError(
            "a loss needs the logits at every position, but read_positions=… asks for some: "
            "take the logits, or leave read_positions out."
        )
    return tokens


def _refuse_left_padding(model: Any, tokens: Int[Tensor, "batch pos"]) -> None:
    # HookedTransformer masks left padding by itself if its tokenizer pads on the left.
    tokenizer = getattr(model, "tokenizer", None)
    if getattr(tokenizer, "padding_side", None) != "left" or tokens.shape[1] < 2:
        return
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is not None and bool((tokens[:, :2] == pad).all(1).any()):
        raise ValueError(
            "tokens start with padding: give prompts of one length per batch, unpadded."
        )


def refuse_dropout(active: Sequence[str]) -> None:
    """Raise ValueError if modules of these types drop activations."""
    if active:
        raise ValueError(
            f"dropout is active ({active[0]}, training mode): masked runs would differ from "
            "one another. Call model.eval() first."
        )


def refuse_generation(*_: Any, **__: Any) -> None:
    """Takes the place of a model's generators. Raises ValueError."""
    raise ValueError(
        "generate is not supported inside masked: its prompts grow token by token, and the "
        "reference run has the length of the first. Run whole prompts and read their logits."
    )


def check_mask(mask: Shaped[Tensor, "..."], graph: EdgeGraph) -> None:
    """Raise ValueError unless `mask` is a float or bool vector over the graph's edges without
    NaN.
    """
    if mask.shape != (graph.n_edges,):
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}, expected ({graph.n_edges},): one value for "
            f"each edge of {graph}, in the order of graph.edges."
        )
    if not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise ValueError(f"the mask has dtype {mask.dtype}, expected floats in [0, 1] or bool.")
    if not bool(torch.isfinite(mask).all()):
        raise ValueError("the mask holds NaN or infinite values; expected numbers in [0, 1].")
