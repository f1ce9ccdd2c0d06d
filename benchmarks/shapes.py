"""Random-weight models of real shapes, for benchmarks: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

GPT2 = {"n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}


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
