"""Tiny models of the families that `model_zoo.ARCHITECTURES` leaves out: their configurations.

The zoo's own architectures stand for kinds of computation, and every test looks at each of them.
These stand for names: each is a family that people ask for, and `test_families.py` alone looks at
it.
"""

from __future__ import annotations

from typing import Any

import transformers

_WIDE = {"hidden_size": 32}  # where a head's size is the width over the number of heads
_NO_HEAD_SIZE = {"hidden_size": 32, "head_dim": ...}  # ...: not among the zoo's sizes
_GROUPS = {"num_key_value_heads": 2}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_EYES = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}

# Architecture: the name of transformers' configuration, and what it has besides the zoo's sizes.
BRIDGE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("LlamaConfig", _GROUPS | {"rope_parameters": _LLAMA3_ROPE}),
    "codellama": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "gemma1": ("GemmaConfig", {"num_key_value_heads": 1}),
    "phi2": ("PhiConfig", _WIDE | {"partial_rotary_factor": 0.5}),  # parallel, one norm for both
    "phi3": ("Phi3Config", _WIDE | _GROUPS | {"sliding_window": 4}),  # queries to values in one map
    "olmo1": ("OlmoConfig", _WIDE | _GROUPS | {"clip_qkv": 2.0}),  # norms without parameters
    "olmo3": ("Olmo3Config", _WIDE | _GROUPS | _WINDOWS),
    "olmoe": ("OlmoeConfig", _WIDE | _GROUPS | _EXPERTS),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        _WIDE
        | _GROUPS
        | _EXPERTS
        | {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 16},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", _GROUPS | _EXPERTS | {"moe_intermediate_size": 12}),
    "gpt-oss": (
        "GptOssConfig",
        _GROUPS | {"num_local_experts": 3, "num_experts_per_tok": 2} | {"sliding_window": 4},
    ),
    "falcon": ("FalconConfig", _NO_HEAD_SIZE | {"multi_query": True, "parallel_attn": True}),
    "stablelm": ("StableLmConfig", _WIDE | _GROUPS),
    "cohere": ("CohereConfig", _WIDE | _GROUPS),
    "starcoder": ("GPTBigCodeConfig", _NO_HEAD_SIZE | {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "starcoder2": ("Starcoder2Config", _WIDE | _GROUPS),
    "smollm3": ("SmolLM3Config", _WIDE | _GROUPS | {"no_rope_layers": [1, 0]}),
    "nemotron": ("NemotronConfig", _GROUPS),
    "codegen": (
        "CodeGenConfig",
        _NO_HEAD_SIZE | {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    ),
    "glm4": ("Glm4Config", _GROUPS),
    "exaone4": ("Exaone4Config", _GROUPS | _WINDOWS),
    "xglm": (
        "XGLMConfig",
        _NO_HEAD_SIZE | {"d_model": 32, "ffn_dim": 28, "num_layers": 2, "attention_heads": 4},
    ),
    # Beside text they read images, of which these prompts have none.
    "gemma3-vision": (
        "Gemma3Config",
        {"text_config": _GROUPS | {"query_pre_attn_scalar": 8, "sliding_window": 4}}
        | {"vision_config": _EYES, "mm_tokens_per_image": 4},
    ),
    "llava": (
        "LlavaConfig",
        {"text_config": {"model_type": "llama"}}
        | {"vision_config": _EYES | {"model_type": "clip_vision_model"}, "image_token_index": 39},
    ),
    # Refused.
    "granite": ("GraniteConfig", _WIDE | _GROUPS | {"residual_multiplier": 0.5}),
    "bloom": ("BloomConfig", _NO_HEAD_SIZE | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "openai-gpt": ("OpenAIGPTConfig", _NO_HEAD_SIZE | {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 4}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "moe_intermediate_size": 12},
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        _GROUPS | _EXPERTS | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "gemma4": ("Gemma4TextConfig", _GROUPS | {"vocab_size_per_layer_input": 8}),
    "jamba": (
        "JambaConfig",
        _GROUPS
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
        | {"hidden_size": 32},
    ),
    "recurrent-gemma": ("RecurrentGemmaConfig", _WIDE | {"num_hidden_layers": 3}),
    "mamba": ("MambaConfig", {"state_size": 4}),
    "mamba2": (
        "Mamba2Config",
        {"hidden_size": 16, "state_size": 4, "num_heads": 4, "n_groups": 1, "chunk_size": 8},
    ),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 20}),
    "bert": ("BertConfig", _NO_HEAD_SIZE),
    "t5": ("T5Config", {"d_model": 24, "d_kv": 6, "d_ff": 28, "num_layers": 2, "num_heads": 4}),
    "bart": (
        "BartConfig",
        {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 28, "decoder_ffn_dim": 28},
    ),
    "vit": ("ViTConfig", {"hidden_size": 24, "image_size": 8, "patch_size": 4}),
    "hubert": (
        "HubertConfig",
        {"hidden_size": 32, "conv_dim": [8], "conv_stride": [2], "conv_kernel": [4]}
        | {"num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 1},
    ),
}
# Not a language model's class: the one that its family comes with.
CLASSES = {
    "gemma3-vision": "Gemma3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "hubert": "HubertModel",
}


def model_of(name: str, sizes: dict[str, Any]) -> transformers.PreTrainedModel:
    """A transformers model of these sizes, its weights as they are drawn."""
    kind, own = BRIDGE[name]
    settings = {key: value for key, value in (sizes | own).items() if value is not ...}
    if "text_config" in own:
        settings = own | {"text_config": sizes | own["text_config"]}
    config = getattr(transformers, kind)(**settings)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the default's grouped product refuses float64
    if name in CLASSES:
        return getattr(transformers, CLASSES[name])(config)
    return transformers.AutoModelForCausalLM.from_config(config)


_ROTARY = {"positional_embedding_type": "rotary", "d_head": 8, "rotary_dim": 8}
_LLAMA = _ROTARY | {"normalization_type": "RMS", "final_rms": True, "gated_mlp": True}
_LLAMA |= {"act_fn": "silu"}
_LOCAL = {"use_local_attn": True, "attn_types": ["local", "global"], "window_size": 4}
_OLMO2 = _LLAMA | {"d_model": 32, "final_rms": False}

# The settings that TransformerLens' own loading gives a HookedTransformer of each family.
HOOKED: dict[str, dict[str, Any]] = {
    "gpt-neo": {"normalization_type": "LN", "use_attn_scale": False}
    | _LOCAL
    | {"attn_types": ["global", "local"]},
    "opt": {"normalization_type": "LN", "act_fn": "relu"},
    "llama3": _LLAMA
    | {"n_key_value_heads": 2, "rotary_base": 500000.0, "use_NTK_by_parts_rope": True}
    | {"NTK_by_parts_low_freq_factor": 1.0, "NTK_by_parts_high_freq_factor": 4.0}
    | {"NTK_by_parts_factor": 8.0, "NTK_original_ctx_len": 8},
    "codellama": _LLAMA | {"rotary_base": 1000000},
    "mistral": _LLAMA
    | {"n_key_value_heads": 2}
    | _LOCAL
    | {"attn_types": ["local", "local"], "final_rms": False},
    "gemma1": _LLAMA | {"n_key_value_heads": 1, "act_fn": "gelu"},
    "gemma3": _LLAMA
    | {"n_key_value_heads": 2, "use_normalization_before_and_after": True, "use_qk_norm": True}
    | {"rotary_base": 1000000, "rotary_base_local": 10000, "act_fn": "gelu_pytorch_tanh"}
    | _LOCAL,
    "phi2": _ROTARY
    | {"normalization_type": "LN", "parallel_attn_mlp": True, "rotary_dim": 4, "act_fn": "gelu"},
    "phi3": _LLAMA | {"n_key_value_heads": 2} | _LOCAL | {"attn_types": ["local", "local"]},
    "olmo1": _ROTARY
    | {"normalization_type": "LN", "gated_mlp": True, "act_fn": "silu", "clip_qkv": 2.0},
    "olmo2": _OLMO2 | {"original_architecture": "Olmo2ForCausalLM"},
    "olmo3": _OLMO2
    | {"original_architecture": "Olmo3ForCausalLM", "rotary_base_local": 10000}
    | _LOCAL,
    "olmoe": _OLMO2
    | {"original_architecture": "OlmoeForCausalLM", "num_experts": 3, "experts_per_token": 2},
    "gpt-oss": _LLAMA
    | {"n_key_value_heads": 2, "num_experts": 3, "experts_per_token": 2}
    | {"original_architecture": "GptOssForCausalLM", "use_attention_sinks": True}
    | _LOCAL,
    "bloom": {
        "normalization_type": "LN",
        "positional_embedding_type": "alibi",
        "post_embedding_ln": True,
        "act_fn": "gelu_fast",
    },
    "solu": {"normalization_type": "LN", "act_fn": "solu_ln"},
    "solu-lnpre": {"normalization_type": "LNPre", "act_fn": "solu_ln"},
    "shortformer": {
        "normalization_type": "LN",
        "attn_only": True,
        "positional_embedding_type": "shortformer",
    },
}
