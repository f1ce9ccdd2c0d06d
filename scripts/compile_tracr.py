"""Compiles the Tracr programs of the package and writes their weights.

    pip install "tl_edgeprune[tracr]"
    python scripts/compile_tracr.py                  # into tl_edgeprune/models/tracr_weights/

1. `models.rasp` compiles each program.
2. The RASP program's outputs on some prompts go into the JSON file; the tests compare the shipped
   weights with them.
3. So do the program's circuits: the edges that are necessary when cut one at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file
from tracr.compiler import lib
from tracr.rasp import rasp

from tl_edgeprune import necessary_edges, tasks
from tl_edgeprune.models import tracr
from tl_edgeprune.models.rasp import compile_program
from tl_edgeprune.models.tracr import Compiled


class Program(NamedTuple):
    name: str
    program: rasp.SOp
    vocab: frozenset[str] | frozenset[int]
    max_tokens: int = 5  # after BOS


PROGRAMS = (
    Program("tracr-xproportion", lib.make_frac_prevs(rasp.tokens == "x"), frozenset("wxyz")),
    Program("tracr-reverse", lib.make_reverse(rasp.tokens), frozenset({1, 2, 3})),
    Program("tracr-hist", lib.make_hist(), frozenset("abc")),
    Program(
        "tracr-sort",
        lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=4, min_key=1),
        frozenset({1, 2, 3}),
        4,
    ),
    Program("tracr-length", lib.make_length(), frozenset("ab")),
    Program("tracr-pair-balance", lib.make_pair_balance(rasp.tokens, "(", ")"), frozenset("()x")),
    Program("tracr-shuffle-dyck", lib.make_shuffle_dyck(["()"]), frozenset("()"), 4),
)


def examples(config: dict[str, Any], program: Program, per_length: int) -> list[dict[str, list]]:
    """Some prompts of each length as token ids, and the RASP program's outputs after BOS.

    An output is a number, or the column's index for programs with a column per value.
    """
    generator = np.random.default_rng(0)
    found = []
    for length in range(1, program.max_tokens + 1):
        prompts = list(itertools.product(sorted(program.vocab), repeat=length))
        for i in generator.permutation(len(prompts))[:per_length]:
            tokens = [config["bos"], *(config["vocab"][str(token)] for token in prompts[i])]
            said = program.program(list(prompts[i]))
            columns = config["outputs"]
            output = [columns.index(v) if columns else float(v) for v in said]
            found.append({"tokens": tokens, "output": output})
    return found


def circuits(compiled: Compiled) -> dict[str, list[str]]:
    """The necessary edges under each ablation, on every prompt with two corrupted prompts each."""
    model = tracr.build(compiled, "bridge", torch.device("cpu"), torch.float64)
    n_prompts = sum(
        len(compiled.config["tokens"]) ** n for n in range(1, compiled.config["model"]["n_ctx"])
    )
    found = {}
    for ablation in ("zero", "counterfactual"):
        rounds = 1 if ablation == "zero" else 2
        task = tasks.load("tracr", model, rounds * n_prompts, seed=0)
        circuit = necessary_edges(model, task, ablation=ablation, batch_size=64)
        found[ablation] = list(circuit.edges)
    return found


def write(program: Program, out: Path, per_length: int) -> None:
    compiled = compile_program(
        program.program, vocab=program.vocab, max_seq_len=program.max_tokens, name=program.name
    )
    arrays = {key: tensor.numpy() for key, tensor in compiled.state.items()}
    save_file(arrays, out / f"{program.name}.safetensors")
    more = {
        "circuits": circuits(compiled),
        "examples": examples(compiled.config, program, per_length),
    }
    text = json.dumps(compiled.config | more, indent=1)
    (out / f"{program.name}.json").write_text(text + "\n", encoding="utf-8")
    print(program.name, {kind: len(edges) for kind, edges in more["circuits"].items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=tracr.WEIGHTS, help="folder to write to")
    parser.add_argument("--examples", type=int, default=12, help="checked prompts per length")
    parser.add_argument("--only", nargs="*", help="names of programs; all by default")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for program in PROGRAMS:
        if not args.only or program.name in args.only:
            write(program, args.out, args.examples)


if __name__ == "__main__":
    main()
