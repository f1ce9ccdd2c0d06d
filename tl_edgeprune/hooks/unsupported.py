"""Models that have no graph of heads and MLPs, refused by name with the reason, before any run.

Any other such model fails the check of `forward/self_check.py`: with every edge kept, and with
every edge into heads and MLPs cut, a model must give the logits that the masks predict.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.utilities.architectures import classify_architecture

# Kinds of model, as TransformerLens names them.
KINDS = {
    "seq2seq": "it is an encoder-decoder: its decoder also reads the encoder, through attention "
    "that no edge of the graph carries.",
    "masked_lm": "it is an encoder with a norm after every sum: what a block hands on is that "
    "norm's output, not a sum of heads and MLPs.",
    "audio": "it reads audio, and edge masks need prompts of tokens.",
    "vision": "it reads images, and edge masks need prompts of tokens.",
}
# Classes of TransformerLens 3 beside HookedTransformer, by their kind.
CLASSES = {
    "HookedEncoder": "masked_lm",
    "BertNextSentencePrediction": "masked_lm",
    "HookedEncoderDecoder": "seq2seq",
    "HookedAudioEncoder": "audio",
}
_SEVERAL_STREAMS = "it keeps several residual streams side by side (AltUp)."
_HEADS_OF_SIZES = "its layers have heads of different sizes, and later layers share earlier keys."
# transformers' classes that a TransformerBridge wraps.
BRIDGED = {
    "BloomForCausalLM": "its attention and MLP add the residual stream inside themselves, so the "
    "Bridge has no point where only the MLP writes. TransformerLens 3 loads it as a "
    "HookedTransformer, which is supported.",
    "Gemma3nForCausalLM": _SEVERAL_STREAMS,
    "Gemma3nForConditionalGeneration": _SEVERAL_STREAMS,
    "Gemma4ForCausalLM": _HEADS_OF_SIZES,
    "Gemma4ForConditionalGeneration": _HEADS_OF_SIZES,
    "OpenAIGPTLMHeadModel": KINDS["masked_lm"].replace("an encoder", "a decoder"),
}


def refuse_class(model: Any) -> None:
    """Raise NotImplementedError for a TransformerLens class whose models have no such graph."""
    kinds = [CLASSES[c.__name__] for c in type(model).__mro__ if c.__name__ in CLASSES]
    if kinds:
        raise NotImplementedError(f"{type(model).__name__} is not supported: {KINDS[kinds[0]]}")


def refuse_unsupported(model: Any) -> None:
    """Raise NotImplementedError, naming the model and the part, if it does not split."""
    name = getattr(model.cfg, "model_name", type(model).__name__)
    reason = _reason_in_kind(model) or _reason_in_blocks(model) or _reason_in_loading(model)
    if reason is not None:
        raise NotImplementedError(f"{name} is not supported: {reason}")


def _reason_in_kind(model: Any) -> str | None:
    cfg = model.cfg
    if getattr(cfg, "is_encoder_decoder", False):
        return KINDS["seq2seq"]
    original = type(getattr(model, "original_model", None)).__name__
    architecture = getattr(cfg, "architecture", None) or original
    kind = "masked_lm" if architecture.endswith("ForMaskedLM") else None
    reason = KINDS.get(kind or classify_architecture(architecture)) or BRIDGED.get(architecture)
    if reason is not None:
        return reason
    if not (hasattr(model, "blocks") and hasattr(model, "unembed")):
        return "it is not a decoder of tokens: it has no blocks or no unembedding."
    if float(getattr(cfg, "residual_multiplier", 1.0) or 1.0) != 1.0:
        return (
            f"it scales what heads and MLPs add to the stream (residual_multiplier="
            f"{cfg.residual_multiplier}), so their outputs are not what later parts read."
        )
    if getattr(cfg, "gated_q_proj", False):
        return (
            "its query projections are gated (they carry an output gate): the gate reads the "
            "query's input but is no part of the query."
        )
    return None


def _reason_in_blocks(model: Any) -> str | None:
    attentions = [getattr(block, "attn", None) for block in model.blocks]
    if all(attention is None for attention in attentions):
        return (
            "its blocks have no attention that TransformerLens shows (a state-space, recurrent or "
            "hybrid model)."
        )
    for layer, attention in enumerate(attentions):
        label = type(attention).__name__
        if attention is None:
            return f"block {layer} has no attention (a hybrid model)."
        if any(name in label for name in ("MLA", "Latent", "MlaAttention")):
            return (
                f"multi-head latent attention ({label}): its keys and values come from a shared "
                "compression, so they have no input of their own to mask."
            )
        if "gate" in getattr(attention, "_modules", {}):
            return f"gated attention ({label})."
    return None


def _reason_in_loading(model: Any) -> str | None:
    cfg = model.cfg
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        return (
            "its weights are DTensors (fully_shard or a tensor parallel plan). They would not be "
            "gathered for the backward pass under masks: load the model whole and use "
            "tl_edgeprune.sharding.sharded(model)."
        )
    if getattr(cfg, "n_devices", 1) > 1:
        return (
            f"it is spread over {cfg.n_devices} devices. Load it on the CPU and shard it: "
            "tl_edgeprune.sharding.sharded(model, device)."
        )
    if getattr(cfg, "load_in_4bit", False):
        return "its weights have 4 bits: load it unquantised."
    return None
