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
        help="What removed edges carry: counterfactual, zero, zero-with-biases, mean, "
        "mean-positional, optimal, or a file of constants (.safetensors).",
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        help="What is kept: kl, mse, logit-diff, log-prob or prob-diff; else the task's own."
    ),
]
TaskSet = Annotated[
    list[str] | None,
    typer.Option("--task-set", help="An option of the task, NAME=VALUE; may be repeated."),
]
Class = Annotated[
    Literal["bridge", "hooked"],
    typer.Option(help="TransformerBridge, or HookedTransformer (TransformerLens below 4)."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="Of weights and activations.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; else the GPU where there is one.")]
Seed = Annotated[int, typer.Option(help="Of pairs, split and training: same seed, same circuit.")]
Absolute = Annotated[
    bool | None,
    typer.Option(
        "--absolute/--signed",
        help="Top edges by the scores' size or as they are.",
        show_default="what fits the method",
    ),
]
Alive = Annotated[
    bool, typer.Option("--alive", help="Take dead edges out: at most the size asked for.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would run and what it takes, and run nothing.")
]
Pos = Annotated[
    int | None,
    typer.Option("--tokens", help="Tokens of a prompt, for --dry-run; else those of the task."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
