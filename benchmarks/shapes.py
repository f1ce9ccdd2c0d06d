"""Models of GPT-2 small's and SmolLM2-135M's shapes with random weights, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from scale import random_model
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_edgeprune import Task
from tl_edgeprune.forward.cost_model import find_shape

GPT2 = {"n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
BATCH, POS, VOCAB = 8, 16, 49_152  # tokens that both shapes have


def gpt2_bridge(n_layers: int = 12, dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """A TransformerBridge of GPT-2 small's shape (or of another depth), random weights."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=n_layers, **GPT2)
    config._attn_implementation = "eager"
    config.architectures = ["GPT2LMHeadModel"]
    module = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    return build_bridge_from_module(
        module, architecture="GPT2LMHeadModel", hf_config=config, tokenizer=None, model_name="gpt2"
    )


def gpt2_hooked(n_layers: int = 12, dtype: torch.dtype = torch.float32) -> Any:
    """A HookedTransformer of the same shape (TransformerLens 3)."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=n_layers,
        d_model=GPT2["n_embd"],
        n_ctx=GPT2["n_positions"],
        d_head=GPT2["n_embd"] // GPT2["n_head"],
        n_heads=GPT2["n_head"],
        d_vocab=GPT2["vocab_size"],
        act_fn="gelu_new",
        normalization_type="LN",
        seed=0,
        dtype=dtype,
        device="cpu",
    )
    return HookedTransformer(config).eval()


def smollm2_bridge(n_layers: int = 30) -> TransformerBridge:
    """A TransformerBridge of SmolLM2-135M's shape (or of another depth), random weights."""
    shape = replace(find_shape("smollm2-135m"), n_layers=n_layers)
    return random_model(shape, torch.float32, "cpu")


KINDS: dict[str, Callable[[int], Any]] = {
    "bridge": gpt2_bridge,
    "hooked": gpt2_hooked,
    "smollm2": smollm2_bridge,
}


def available() -> list[str]:
    """GPT-2's kinds of the installed TransformerLens (4 has no HookedTransformer)."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return ["bridge"]
    return ["bridge", "hooked"]


def load(kind: str, layers: int) -> Any:
    """A model with frozen weights."""
    model = KINDS[kind](layers)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def prompts() -> tuple[Tensor, Tensor]:
    """Clean and corrupted tokens, [batch, pos] each."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(0, VOCAB, (2, BATCH, POS), generator=generator)
    return clean, corrupted


def pairs() -> Task:
    """The same prompts as a task, read at the last position."""
    clean, corrupted = prompts()
    last = [torch.tensor([POS - 1])] * BATCH
    answers, distractors = ([torch.tensor([token])] * BATCH for token in (100, 200))
    return Task("random", list(clean), list(corrupted), last, answers, distractors)
