"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number, by --dtype
Model = Annotated[
    str,
    typer.Argument(
        help="A name (tl-edgeprune models), a folder that save_pretrained wrote, or a model of "
        "the Hugging Face hub."
    ),
]
TaskName = Annotated[
    str, typer.Argument(help="A name (tl-edgeprune tasks) or a .jsonl file of prompt pairs.")
]
Pairs = Annotated[
    int | None,
    typer.Option(help="Prompt pairs in all: 256 of a named task, every line of a file."),
]
HeldOut = Annotated[
    float, typer.Option(help="Share of the pairs that the circuit is judged on, not found on.")
]
Ablation = Annotated[
    str,
    typer.Option(
        help="What removed edges carry: counterfactual, zero, mean, mean-positional or optimal."
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        help="What is kept: kl, mse, logit-diff, log-prob or prob-diff; else the task's own."
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="Of weights and activations.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; else the GPU where there is one.")]
Seed = Annotated[int, typer.Option(help="Of pairs, split and training: same seed, same circuit.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
