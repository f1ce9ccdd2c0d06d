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
    typer.Option(help="Prompt pairs in total; by default 256 of a named task, all of a file."),
]
HeldOut = Annotated[
    float, typer.Option(help="Share of the pairs held out, to evaluate the circuit on.")
]
Ablation = Annotated[
    str | None,
    typer.Option(
        help="What removed edges carry: a name (tl-edgeprune ablations), or a file of constants "
        "(.safetensors).",
        show_default="counterfactual",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Pairs per forward pass of the evaluation.")]
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
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")
]
Seed = Annotated[
    int, typer.Option(help="Of pairs, split and training: the same seed gives the same circuit.")
]
Absolute = Annotated[
    bool | None,
    typer.Option(
        "--absolute/--signed",
        help="Rank edges by the scores' magnitude, or by the signed scores.",
        show_default="depends on the method",
    ),
]
Alive = Annotated[
    bool,
    typer.Option(
        "--alive", help="Remove dead edges; the circuit then has at most the size asked for."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would run and its cost, without running it.")
]
Pos = Annotated[
    int | None,
    typer.Option("--tokens", help="Tokens per prompt, for --dry-run; by default the task's."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
