"""The rows of "What is supported" (`docs/models.md`): model families, each with tiny test models.

`scripts/supported_models.py` makes the page's tables from them, and `test_model_families.py` checks
each row. The zoo lacks models that the installed TransformerLens does not have.
"""

from __future__ import annotations

from typing import NamedTuple

from support import model_zoo, support_claims


class Family(NamedTuple):
    """A family: its common names, examples, models in the zoo by class, and a note."""

    name: str
    examples: str
    bridge: tuple[str, ...]
    hooked: tuple[str, ...] = ()
    note: str = ""


class Refused(NamedTuple):
    """A kind of model that is refused, with its model in the zoo."""

    name: str
    examples: str
    model: str


FAMILIES = (
    Family(
        "GPT-2",
        "gpt2, gpt2-xl, distilgpt2",
        ("bridge-gpt2", "bridge-gpt2-lnpre"),
        ("hooked-gpt2-ln", "hooked-gpt2-lnpre"),
        "`split_embeddings=True` makes tokens and positions two sources",
    ),
    Family(
        "GPT-Neo",
        "gpt-neo-125m, TinyStories",
        ("bridge-gpt-neo",),
        ("hooked-gpt-neo",),
        "local attention in every second layer",
    ),
    Family(
        "GPT-J",
        "gpt-j-6b",
        ("bridge-gptj",),
        ("hooked-gptj",),
        "parallel blocks, one norm for both",
    ),
    Family(
        "Pythia, GPT-NeoX",
        "pythia-70m to 12b, gpt-neox-20b",
        ("bridge-pythia",),
        ("hooked-pythia",),
        "parallel blocks",
    ),
    Family("OPT", "opt-125m to 66b", ("bridge-opt",), ("hooked-opt",)),
    Family(
        "Llama 1, 2",
        "Llama-2-7b, TinyLlama, SmolLM2",
        ("bridge-llama", "bridge-llama-gqa", "bridge-llama-mqa"),
        ("hooked-llama", "hooked-llama-gqa", "hooked-llama-mqa"),
        "shared keys and values in the largest",
    ),
    Family(
        "Llama 3",
        "Llama-3.1-8B, Llama-3.2-1B",
        ("bridge-llama3",),
        ("hooked-llama3",),
        "shared keys and values",
    ),
    Family("CodeLlama", "CodeLlama-7b, -13b", ("bridge-codellama",), ("hooked-codellama",)),
    Family(
        "Mistral",
        "Mistral-7B",
        ("bridge-mistral",),
        ("hooked-mistral",),
        "shared keys and values, local attention",
    ),
    Family(
        "Mixtral",
        "Mixtral-8x7B",
        ("bridge-mixtral",),
        ("hooked-mixtral",),
        "router and experts are one source, `m{layer}`",
    ),
    Family(
        "Qwen 2, 2.5",
        "Qwen2-0.5B, Qwen2.5-7B",
        ("bridge-qwen2",),
        ("hooked-llama-gqa",),
        "shared keys and values; biases on queries, keys and values",
    ),
    Family(
        "Qwen 3",
        "Qwen3-0.6B to 32B",
        ("bridge-qwen3",),
        ("hooked-qwen3",),
        "norms on queries and keys, after the projections",
    ),
    Family(
        "Gemma 1",
        "gemma-2b, gemma-7b",
        ("bridge-gemma1",),
        ("hooked-gemma1",),
        "`input` is the scaled embedding",
    ),
    Family(
        "Gemma 2",
        "gemma-2-2b to 27b",
        ("bridge-gemma2",),
        ("hooked-gemma2",),
        "norms after attention and MLP; soft caps",
    ),
    Family(
        "Gemma 3",
        "gemma-3-270m to 27b",
        ("bridge-gemma3", "bridge-gemma3-vision"),
        ("hooked-gemma3",),
        "norms after attention and MLP; text prompts only",
    ),
    Family(
        "Phi-1, 1.5, 2",
        "phi-1, phi-1_5, phi-2",
        ("bridge-phi2",),
        ("hooked-phi2",),
        "parallel blocks, one norm for both",
    ),
    Family("Phi-3, 3.5, 4", "Phi-3-mini, phi-4", ("bridge-phi3",), ("hooked-phi3",)),
    Family(
        "OLMo 1",
        "OLMo-1B-hf, OLMo-7B-hf",
        ("bridge-olmo1",),
        ("hooked-olmo1",),
        "norms without weights; clipped queries, keys and values",
    ),
    Family(
        "OLMo 2, 3",
        "OLMo-2-1124-7B, Olmo-3-7B",
        ("bridge-olmo2", "bridge-olmo3"),
        ("hooked-olmo2", "hooked-olmo3"),
        "norms after attention and MLP, none before",
    ),
    Family(
        "Attention-only",
        "attn-only-2l, attn-only-2l-demo",
        ("native-attn-only",),
        ("hooked-attn-only", "hooked-shortformer"),
        "Bridge: by `boot_native`; shortformer positions on HookedTransformer",
    ),
    Family(
        "SoLU",
        "solu-1l to solu-12l",
        ("native-solu",),
        ("hooked-solu", "hooked-solu-lnpre"),
        "Bridge: by `boot_native`, from TransformerLens 4",
    ),
    Family(
        "Your own",
        "`boot_native`, a HookedTransformerConfig",
        ("native-ln", "native-lnpre", "native-no-norm", "native-rms-rotary-gqa", "native-soft-cap"),
        ("hooked-no-norm",),
        "with and without norms, either direction of attention",
    ),
)
# Less common families: slow tests.
OTHERS = (
    Family("BLOOM", "bloom-560m", ("bridge-bloom",), ("hooked-bloom",), "Bridge: see below"),
    Family(
        "Qwen MoE", "Qwen1.5-MoE-A2.7B, Qwen3-30B-A3B", ("bridge-qwen2-moe", "bridge-qwen3-moe")
    ),
    Family("OLMoE", "OLMoE-1B-7B", ("bridge-olmoe",), ("hooked-olmoe",)),
    Family("GPT-OSS", "gpt-oss-20b", ("bridge-gpt-oss",), ("hooked-gpt-oss",)),
    Family("Falcon", "falcon-7b", ("bridge-falcon",)),
    Family("StableLM", "stablelm-2-1_6b", ("bridge-stablelm",)),
    Family("Command R", "c4ai-command-r", ("bridge-cohere",)),
    Family("StarCoder", "starcoder, starcoder2-3b", ("bridge-starcoder", "bridge-starcoder2")),
    Family("SmolLM3", "SmolLM3-3B", ("bridge-smollm3",)),
    Family("Nemotron", "Minitron-4B", ("bridge-nemotron",)),
    Family("CodeGen", "codegen-350M", ("bridge-codegen",)),
    Family("GLM 4", "GLM-4-9B-0414", ("bridge-glm4",)),
    Family("EXAONE 4", "EXAONE-4.0-1.2B", ("bridge-exaone4",)),
    Family("XGLM", "xglm-564M", ("bridge-xglm",)),
    Family("LLaVA", "llava-1.5-7b", ("bridge-llava",), (), "text prompts only"),
)
REFUSED = (
    Refused("BERT and similar", "bert-base-cased, roberta-base", "bridge-bert"),
    Refused("Encoder-decoders", "t5-small", "bridge-t5"),
    Refused("Encoder-decoders", "bart-base", "bridge-bart"),
    Refused("Vision", "vit-base-patch16-224", "bridge-vit"),
    Refused("Audio", "hubert-base-ls960", "bridge-hubert"),
    Refused("State-space", "mamba-130m-hf", "bridge-mamba"),
    Refused("State-space", "mamba2", "bridge-mamba2"),
    Refused("Recurrent", "rwkv-4-169m-pile", "bridge-rwkv"),
    Refused("Recurrent", "recurrentgemma-2b", "bridge-recurrent-gemma"),
    Refused("Hybrids", "Jamba", "bridge-jamba"),
    Refused("Hybrids", "Qwen3-Next", "bridge-qwen3-next"),
    Refused("Latent attention", "DeepSeek-V2, -V3, -R1", "bridge-deepseek-v3"),
    Refused("BLOOM on the Bridge", "bloom-560m", "bridge-bloom"),
    Refused("GPT-1", "openai-gpt", "bridge-openai-gpt"),
    Refused("Granite", "granite-3.3-2b", "bridge-granite"),
    Refused("Gemma 4", "gemma-4-E2B", "bridge-gemma4"),
)


def models(family: Family, cls: str) -> list[str]:
    """A family's models of a class ("bridge", "hooked") that the installed TransformerLens has."""
    return [name for name in getattr(family, cls) if name in model_zoo.BUILDERS]


def verdict(family: Family, cls: str) -> str:
    """The table's cell: "yes", "no" (refused) or "–" (TransformerLens has no such model).

    Raises AssertionError if a model is neither refused nor right.
    """
    refusals = [support_claims.refusal(name) for name in models(family, cls)]
    if not refusals:
        return "–"
    assert len({refusal is None for refusal in refusals}) == 1, refusals
    return "no" if refusals[0] else "yes"


def reason(refused: Refused) -> str:
    """The reason given by the error. Raises AssertionError if the model is not refused."""
    message = support_claims.refusal(refused.model)
    assert message is not None, f"{refused.model} is not refused"
    return message.partition(" is not supported: ")[2]
