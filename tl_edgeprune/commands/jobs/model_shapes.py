"""A model's shape without its weights: by the planner's names, or from a folder's config.json."""

from __future__ import annotations

from pathlib import Path

from tl_edgeprune.forward.cost_model import SHAPES, Shape
from tl_edgeprune.utils.reading import read_json

LLAMAS = ("llama", "mistral", "qwen2", "qwen3")


def shape_of(model: str) -> Shape | None:
    """The shape where it is known: the planner's models, and folders of Llamas and of GPT-2."""
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model) / "config.json"
    if not path.is_file():
        return None
    try:
        config = read_json(path, "model's config")
        if config.get("model_type") in LLAMAS:
            return _llama(Path(model).name, config)
        return _gpt2(Path(model).name, config) if config.get("model_type") == "gpt2" else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): save the model again.") from None


def _llama(name: str, config: dict) -> Shape:
    heads, d_model = config["num_attention_heads"], config["hidden_size"]
    return Shape(
        name,
        config["num_hidden_layers"],
        heads,
        config.get("num_key_value_heads") or heads,
        d_model,
        config.get("head_dim") or d_model // heads,
        config["intermediate_size"],
        config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")),
    )


def _gpt2(name: str, config: dict) -> Shape:
    heads, d_model = config["n_head"], config["n_embd"]
    return Shape(
        name,
        config["n_layer"],
        heads,
        heads,
        d_model,
        d_model // heads,
        config.get("n_inner") or 4 * d_model,
        config["vocab_size"],
        n_ctx=config["n_positions"],
        gated=False,
        tied=True,
        joint=True,
    )
