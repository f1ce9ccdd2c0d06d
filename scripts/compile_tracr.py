"""Compile the Tracr programs of the ACDC and Edge Pruning papers, and write them for the package.

    pip install jax jaxlib dm-haiku chex einops networkx safetensors
    pip install --no-deps tracr-pypi
    python scripts/compile_tracr.py                  # into tl_edgeprune/models/tracr_weights/

1. Tracr (Lindner et al. 2023, arXiv 2301.05062) compiles a RASP program to transformer weights.
2. The weights are renamed and reshaped to TransformerLens' names; the unembedding is the
   projection on the program's output, so logits are the numbers that the program computes.
3. Outputs of the compiled program itself on checked prompts go into the JSON file: what
   tests hold the shipped weights to.
"""

from __future__ import annotations

import argparse
import itertools
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

WEIGHTS = Path(__file__).parents[1] / "tl_edgeprune" / "models" / "tracr_weights"
MAX_TOKENS = 5  # after BOS
BOS = "BOS"


class Program(NamedTuple):
    name: str
    program: rasp.SOp
    vocab: frozenset[str] | frozenset[int]


PROGRAMS = (
    Program(
        "tracr-xproportion",
        lib.make_frac_prevs(rasp.tokens == "x"),
        frozenset({"w", "x", "y", "z"}),
    ),
    Program("tracr-reverse", lib.make_reverse(rasp.tokens), frozenset({1, 2, 3})),
)


def compile_program(program: Program) -> Any:
    return compiling.compile_rasp_to_model(
        program.program, vocab=set(program.vocab), max_seq_len=MAX_TOKENS, compiler_bos=BOS
    )


def output_directions(compiled: Any, program: Program) -> list[int]:
    """Rows of the residual stream that hold the program's output, in the output's own order."""
    labels = [label.split(":")[0] for label in compiled.residual_labels]  # of "reverse_4:1"
    return [row for row, label in enumerate(labels) if label == program.program.label]


def weights(compiled: Any, outputs: list[int]) -> dict[str, np.ndarray]:
    """Tracr's parameters under TransformerLens' names, without the biases (all zero)."""
    params = {name: {k: np.asarray(v) for k, v in p.items()} for name, p in compiled.params.items()}
    n_heads, d_head = compiled.model_config.num_heads, compiled.model_config.key_size
    d_model = len(compiled.residual_labels)
    state = {
        "embed.W_E": params["token_embed"]["embeddings"],
        "pos_embed.W_pos": params["pos_embed"]["embeddings"],
        "unembed.W_U": np.eye(d_model, dtype=np.float32)[:, outputs],
    }
    for layer in range(compiled.model_config.num_layers):
        source, target = f"transformer/layer_{layer}", f"blocks.{layer}"
        for theirs, ours in (("query", "Q"), ("key", "K"), ("value", "V")):
            heads = params[f"{source}/attn/{theirs}"]["w"].reshape(d_model, n_heads, d_head)
            state[f"{target}.attn.W_{ours}"] = heads.transpose(1, 0, 2)  # [head, d_model, d_head]
        output = params[f"{source}/attn/linear"]["w"]
        state[f"{target}.attn.W_O"] = output.reshape(n_heads, d_head, d_model)
        state[f"{target}.mlp.W_in"] = params[f"{source}/mlp/linear_1"]["w"]
        state[f"{target}.mlp.W_out"] = params[f"{source}/mlp/linear_2"]["w"]
    check_no_bias(params)
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in state.items()}


def check_no_bias(params: dict[str, dict[str, np.ndarray]]) -> None:
    for name, parameter in params.items():
        if np.any(parameter.get("b", 0)):
            raise ValueError(f"{name} has a bias, but compiled programs are expected to have none")


def examples(compiled: Any, program: Program, per_length: int) -> list[dict[str, list]]:
    """Some prompts of each length as token ids, and what the compiled program says after BOS."""
    encoder = compiled.input_encoder
    generator = np.random.default_rng(0)
    found = []
    for length in range(1, MAX_TOKENS + 1):
        prompts = list(itertools.product(sorted(program.vocab), repeat=length))
        for i in generator.permutation(len(prompts))[:per_length]:
            decoded = compiled.apply([BOS, *prompts[i]]).decoded[1:]
            tokens = encoder.encode([BOS, *prompts[i]])
            found.append({"tokens": tokens, "output": [as_output(compiled, v) for v in decoded]})
    return found


def as_output(compiled: Any, value: Any) -> float | int:
    """A number, or for programs that write tokens the index of the output's column."""
    encoding = getattr(compiled.output_encoder, "encoding_map", None)
    return float(value) if encoding is None else encoding[value]


def config(compiled: Any, program: Program, outputs: list[int], per_length: int) -> dict[str, Any]:
    tokens = compiled.input_encoder.encoding_map
    shape = compiled.model_config
    return {
        "name": program.name,
        "format": 1,
        "versions": {p: version(p) for p in ("tracr-pypi", "jax", "dm-haiku")},
        "model": {
            "n_layers": shape.num_layers,
            "n_heads": shape.num_heads,
            "d_model": len(compiled.residual_labels),
            "d_head": shape.key_size,
            "d_mlp": shape.mlp_hidden_size,
            "n_ctx": MAX_TOKENS + 1,
            "d_vocab": len(tokens),
            "d_vocab_out": len(outputs),
        },
        "bos": tokens[BOS],
        "tokens": sorted(tokens[token] for token in program.vocab),
        "vocab": {str(token): index for token, index in tokens.items()},
        "residual_labels": list(compiled.residual_labels),
        "examples": examples(compiled, program, per_length),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder to write to")
    parser.add_argument("--examples", type=int, default=12, help="checked prompts per length")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for program in PROGRAMS:
        compiled = compile_program(program)
        outputs = output_directions(compiled, program)
        save_file(weights(compiled, outputs), args.out / f"{program.name}.safetensors")
        text = json.dumps(config(compiled, program, outputs, args.examples), indent=1)
        (args.out / f"{program.name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
