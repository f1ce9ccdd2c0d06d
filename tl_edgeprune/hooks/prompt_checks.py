"""Checks that a model can take prompts: tokens in its vocabulary, and not too many of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tl_edgeprune.hooks.modules import longest_prompt


def check_corrupted(model: Any, corrupted: Any) -> None:
    """Raise TypeError or ValueError unless these are prompts [batch, pos] that the model takes."""
    if not isinstance(corrupted, Tensor):
        raise TypeError(
            f"corrupted is a {type(corrupted).__name__}, expected a tensor of tokens [batch, pos]: "
            "use model.to_tokens or torch.tensor first."
        )
    if corrupted.dim() != 2 or corrupted.is_floating_point() or corrupted.dtype == torch.bool:
        raise ValueError(
            f"corrupted has shape {tuple(corrupted.shape)} and type {corrupted.dtype}, expected "
            "tokens [batch, pos]."
        )
    check_prompts(model, [corrupted], "corrupted")


def check_prompts(model: Any, prompts: Sequence[Tensor] | Tensor, what: str) -> None:
    """Raise ValueError if prompts [..., pos] have unknown tokens or are too long for the model."""
    prompts = [torch.as_tensor(tokens) for tokens in prompts]
    check_vocabulary(model, prompts, what)
    check_length(model, max((t.shape[-1] for t in prompts if t.dim()), default=0), what)


def check_vocabulary(model: Any, tokens: Sequence[Tensor], what: str) -> None:
    vocab = int(model.cfg.d_vocab)
    ranges = [torch.stack(prompt.aminmax()).tolist() for prompt in tokens if prompt.numel()]
    highest = max((range_[1] for range_ in ranges), default=0)
    lowest = min((range_[0] for range_ in ranges), default=0)
    for token in (highest, lowest):
        if not 0 <= token < vocab:
            raise ValueError(f"{what} has token {token}, but the model knows 0 to {vocab - 1}.")


def check_length(model: Any, length: int, what: str) -> None:
    longest = longest_prompt(model)
    if longest is not None and length > longest:
        raise ValueError(
            f"{what} has a prompt of {length} tokens, but the model has positions for {longest} "
            "(n_ctx): give shorter ones."
        )
