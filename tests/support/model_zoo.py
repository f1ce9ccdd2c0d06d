"""Tiny random models: every architecture, in every TransformerLens class that the package supports.

`ARCHITECTURES` names what the installed TransformerLens can build, `load(name, dtype)` gives a
model (one per process: leave it as you found it), `build` a fresh one to break at will, and
`tokens(model, batch, pos, seed)` a prompt. Names read `{class}-{architecture}`: "bridge" is a
TransformerBridge around a transformers model, "native" one from boot_native, "hooked" a
HookedTransformer (TransformerLens 3 only).

Every parameter is random and far from its usual start: norms have weights other than 1 and
biases other than 0, output biases are not 0, so that a forgotten bias or norm changes the logits.
Nearly all have n_heads * d_head != d_model; transformers' GPT-2, GPT-NeoX, GPT-J, GPT-Neo and OPT
cannot. The weights of a name are the same in both dtypes, up to rounding.
"""

from __future__ import annotations

import functools
import re
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

from support import family_configs
from tl_edgeprune import Task

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # TransformerLens 4
    HookedTransformer = None

VOCAB = 40
N_CTX = 24
OFFSET_NORMS = ("gemma", "nemotron")  # their norms multiply by 1 + weight

# ---------------------------------------------------------------------------------------- weights


def randomise(
    module: nn.Module, seed: int, *, offset_norms: bool = False, scale: float = 0.35
) -> None:
    """Overwrite every parameter; offset_norms: norms that multiply by 1 + weight (Gemma)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = re.search(r"(^|[._])(ln|norm)|norm(\.|$)", name) is not None
            if is_norm and re.search(r"(weight|\.w)$", name):
                noise = 0.3 * noise + (0.0 if offset_norms else 1.0)
            elif re.search(r"embed|wte|wpe|W_E|W_pos|^pos\.", name) and "unembed" not in name:
                noise = 0.8 * noise
            else:
                noise = scale * noise
            parameter.copy_(noise)


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


# ------------------------------------------------------------------- transformers' models, bridged

_SIZES = {  # n_heads * d_head = 32 against d_model = 20
    "vocab_size": VOCAB,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": N_CTX,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": N_CTX}


def _config(name: str) -> transformers.PretrainedConfig:
    tf = transformers
    match name:
        case "gpt2" | "gpt2-lnpre":
            return tf.GPT2Config(**_GPT2)
        case "pythia":  # parallel blocks, a quarter of each head rotates
            sizes = _SIZES | {"hidden_size": 32, "rotary_pct": 0.25, "num_hidden_layers": 3}
            return tf.GPTNeoXConfig(**sizes, use_parallel_residual=True)
        case "gptj":  # parallel blocks, one norm for both
            return tf.GPTJConfig(**(_GPT2 | {"n_embd": 32, "rotary_dim": 4}))
        case "gpt-neo":  # local attention in the second layer, scores not scaled
            sizes = {"hidden_size": 24, "num_layers": 2, "num_heads": 4, "window_size": 4}
            return tf.GPTNeoConfig(
                vocab_size=VOCAB,
                max_position_embeddings=N_CTX,
                attention_types=[[["global", "local"], 1]],
                **sizes,
            )
        case "opt":
            sizes = {"ffn_dim": 28, "word_embed_proj_dim": 24, "hidden_size": 24, "head_dim": 6}
            return tf.OPTConfig(**(_SIZES | sizes))
        case "llama":
            return tf.LlamaConfig(**_SIZES, num_key_value_heads=4)
        case "llama-gqa":  # with biases, so that b_O under grouped-query attention is seen
            return tf.LlamaConfig(
                **(_SIZES | {"num_hidden_layers": 3}),
                num_key_value_heads=2,
                attention_bias=True,
                mlp_bias=True,
            )
        case "llama-mqa":
            return tf.LlamaConfig(**_SIZES, num_key_value_heads=1)
        case "qwen2":
            sizes = _SIZES | {"hidden_size": 32}
            return tf.Qwen2Config(**sizes, num_key_value_heads=2)
        case "qwen3":  # norms on queries and keys
            return tf.Qwen3Config(**_SIZES, num_key_value_heads=2)
        case "mistral":
            return tf.MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=4)
        case "mixtral":
            return tf.MixtralConfig(
                **_SIZES, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2
            )
        case "gemma2":  # norms after attention and after the MLP, soft caps, scaled embedding
            return tf.Gemma2Config(
                **_SIZES,
                num_key_value_heads=2,
                query_pre_attn_scalar=8,
                sliding_window=4,
                attn_logit_softcapping=5.0,
                final_logit_softcapping=8.0,
            )
        case "gemma3":  # Gemma 2 with norms on queries and keys, without soft caps
            return tf.Gemma3TextConfig(
                **_SIZES, num_key_value_heads=2, query_pre_attn_scalar=8, sliding_window=4
            )
        case "olmo2":  # norms after attention and after the MLP only; q and k norms over all heads
            return tf.Olmo2Config(**(_SIZES | {"hidden_size": 32}), num_key_value_heads=2)
    raise ValueError(f"no transformers model {name!r} in the zoo")


def _transformer(name: str) -> transformers.PreTrainedModel:
    if name in family_configs.BRIDGE:
        return family_configs.model_of(name, _SIZES)
    config = _config(name)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the default's grouped product refuses float64
    return transformers.AutoModelForCausalLM.from_config(config)


def _bridge(name: str, dtype: torch.dtype) -> TransformerBridge:
    with torch.random.fork_rng(devices=[]):
        hf_model = _transformer(name)
    randomise(hf_model, _seed(name), offset_norms=name.startswith(OFFSET_NORMS))
    hf_model.to(dtype).eval()
    # Not boot_transformers: without a tokenizer it asks the Hugging Face hub for one.
    model = build_bridge_from_module(
        hf_model,
        type(hf_model).__name__,
        hf_config=hf_model.config,
        model_name=f"tiny-random/{name}",
    )
    if name.endswith("-lnpre"):
        model.enable_compatibility_mode(disable_warnings=True)
    return model


# ----------------------------------------------------------------------------- boot_native's models

_NATIVE: dict[str, dict[str, Any]] = {
    "ln": {"normalization_type": "LN"},
    "rms-rotary-gqa": {
        "normalization_type": "RMS",
        "final_rms": True,
        "positional_embedding_type": "rotary",
        "n_key_value_heads": 2,
        "gated_mlp": True,
        "act_fn": "silu",
    },
    "attn-only": {"normalization_type": "LN", "attn_only": True, "n_layers": 3},
    "lnpre": {"normalization_type": "LNPre"},
    "no-norm": {"normalization_type": None, "act_fn": "relu", "attention_dir": "bidirectional"},
    "solu": {"normalization_type": "LN", "act_fn": "solu_ln"},
    "soft-cap": {
        "normalization_type": "RMS",
        "attn_scores_soft_cap": 5.0,
        "output_logits_soft_cap": 8.0,
        "n_key_value_heads": 1,
    },
}
_TL_SIZES: dict[str, Any] = {  # n_heads * d_head = 24 against d_model = 20
    "d_model": 20,
    "d_head": 6,
    "n_heads": 4,
    "n_layers": 2,
    "n_ctx": N_CTX,
    "d_vocab": VOCAB,
    "d_mlp": 28,
    "act_fn": "gelu_new",
    "seed": 0,
}


def _native(name: str, dtype: torch.dtype) -> TransformerBridge:
    model = TransformerBridge.boot_native(_TL_SIZES | _NATIVE[name], dtype=dtype, device="cpu")
    randomise(model.original_model, _seed(name), scale=0.2 if name == "no-norm" else 0.35)
    return model.eval()


# ------------------------------------------------------------------------------- HookedTransformer

_ROTARY = {"positional_embedding_type": "rotary", "d_head": 8, "rotary_dim": 8}
_LLAMA = _ROTARY | {"normalization_type": "RMS", "final_rms": True} | {"gated_mlp": True}
_LLAMA |= {"act_fn": "silu"}
_HOOKED: dict[str, dict[str, Any]] = {
    "gpt2-ln": {"normalization_type": "LN", "n_layers": 3},
    "gpt2-lnpre": {"normalization_type": "LNPre"},
    "pythia": _ROTARY | {"normalization_type": "LN", "parallel_attn_mlp": True, "rotary_dim": 4},
    "gptj": _ROTARY
    | {"normalization_type": "LN", "parallel_attn_mlp": True, "rotary_dim": 4}
    | {"rotary_adjacent_pairs": True},
    "llama": _LLAMA,
    "llama-gqa": _LLAMA | {"n_key_value_heads": 2, "n_layers": 3},
    "llama-mqa": _LLAMA | {"n_key_value_heads": 1},
    "qwen3": _LLAMA | {"n_key_value_heads": 2, "use_qk_norm": True},
    "mixtral": _LLAMA | {"n_key_value_heads": 2, "num_experts": 3, "experts_per_token": 2},
    "gemma2": _LLAMA
    | {"n_key_value_heads": 2, "use_normalization_before_and_after": True}
    | {"attn_scores_soft_cap": 5.0, "output_logits_soft_cap": 8.0, "act_fn": "gelu_pytorch_tanh"}
    | {"use_local_attn": True, "attn_types": ["local", "global"], "window_size": 4},
    "attn-only": {"normalization_type": "LN", "attn_only": True, "n_layers": 3},
    "no-norm": {"normalization_type": None, "act_fn": "relu", "attention_dir": "bidirectional"},
}


def _hooked(name: str, dtype: torch.dtype) -> Any:
    settings = _HOOKED.get(name) or family_configs.HOOKED[name]
    config = HookedTransformerConfig(**(_TL_SIZES | settings), dtype=dtype, device="cpu")
    with torch.random.fork_rng(devices=[]):
        model = HookedTransformer(config)
    randomise(model, _seed(name), scale=0.2 if name == "no-norm" else 0.35)
    if name in ("gptj", "phi2"):  # one norm for both: HookedTransformer keeps it twice
        for block in model.blocks:
            block.ln2.load_state_dict(block.ln1.state_dict())
    if name in (
        "gemma2",
        "gemma3",
        "olmo2",
        "olmo3",
    ):  # an output bias inside the post-norm, which no real model has, is no sum
        for block in model.blocks:
            nn.init.zeros_(block.attn.b_O)
    return model.eval()


# ------------------------------------------------------------------------------------------ surface

_BRIDGE = (
    *("gpt2", "gpt2-lnpre", "pythia", "llama", "llama-gqa", "llama-mqa", "qwen2", "qwen3"),
    *("mistral", "mixtral", "gemma2", "gemma3", "olmo2", "gptj", "gpt-neo", "opt"),
)
# Their experts multiply by float32 weights whatever the dtype; XGLM's mask does not fit.
NO_FLOAT64 = {"hooked-mixtral", "hooked-olmoe", "hooked-gpt-oss", "bridge-xglm"}

# transformers computes RMS norms, attention scores or softmax in float32 whatever the dtype, and
# boot_native its RMS and LNPre norms: float64 is rounded to float32 on the way, so that 1e-6 is the
# best to expect, and finite differences need large steps.
FLOAT32_INSIDE = {
    *(f"bridge-{name}" for name in ("llama", "llama-gqa", "llama-mqa", "qwen2", "qwen3")),
    *(f"bridge-{name}" for name in ("mistral", "mixtral", "gemma2", "gemma3", "olmo2")),
    *(f"bridge-{name}" for name in ("gptj", "gpt-neo", "opt")),
    *("native-lnpre", "native-rms-rotary-gqa", "native-soft-cap"),
    *(f"bridge-{name}" for name in family_configs.BRIDGE),
}

BUILDERS: dict[str, Callable[[torch.dtype], Any]] = {
    **{f"bridge-{name}": functools.partial(_bridge, name) for name in _BRIDGE},
    **{f"native-{name}": functools.partial(_native, name) for name in _NATIVE},
}
if HookedTransformer is not None:
    del BUILDERS["native-solu"]  # boot_native has SoLU since TransformerLens 4
    BUILDERS |= {f"hooked-{name}": functools.partial(_hooked, name) for name in _HOOKED}

ARCHITECTURES: list[str] = sorted(BUILDERS)

BUILDERS |= {f"bridge-{name}": functools.partial(_bridge, name) for name in family_configs.BRIDGE}
if HookedTransformer is not None:
    BUILDERS |= {
        f"hooked-{name}": functools.partial(_hooked, name) for name in family_configs.HOOKED
    }


def dtypes(name: str) -> list[torch.dtype]:
    return [torch.float32] if name in NO_FLOAT64 else [torch.float32, torch.float64]


def tolerance(name: str, dtype: torch.dtype) -> float:
    """The largest absolute difference of logits (of size 1 to 10) that counts as equal."""
    if dtype == torch.float32:
        return 1e-4
    return 1e-5 if name in FLOAT32_INSIDE else 1e-10


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh model in eval mode; its parameters require gradients."""
    if name not in BUILDERS:
        raise ValueError(f"no model {name!r} in the zoo: expected one of {ARCHITECTURES}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BUILDERS[name](dtype)


@functools.cache
def load(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """As `build`, but one model per process and dtype: whoever changes it must undo it."""
    return build(name, dtype)


def tokens(model: Any, batch: int = 2, pos: int = 7, seed: int = 0) -> Tensor:
    """Random token ids, [batch, pos]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.cfg.d_vocab, (batch, pos), generator=generator)


def pairs(model: Any, n: int = 10) -> Task:
    """Random pairs of two lengths, read at the last position, with an answer and a distractor."""
    lengths = [5 + i % 2 for i in range(n)]
    clean = [tokens(model, 1, length, seed)[0] for seed, length in enumerate(lengths)]
    corrupted = [tokens(model, 1, length, 99 + seed)[0] for seed, length in enumerate(lengths)]
    last = [torch.tensor([length - 1]) for length in lengths]
    answers = [torch.tensor([3])] * n
    return Task("random", clean, corrupted, last, answers, [torch.tensor([5])] * n)
