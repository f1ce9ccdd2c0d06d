"""`tl-edgeprune plan`: the cost of a training step, before it is run."""

from __future__ import annotations

import json
import math
from typing import Annotated, Literal

import typer

from tl_edgeprune.commands.common.errors import with_error_messages
from tl_edgeprune.commands.common.options import Json


@with_error_messages
def plan(
    model: Annotated[str, typer.Option(help="gpt2, smollm2-135m, llama-3-8b or codellama-13b.")],
    gpu_memory: Annotated[float, typer.Option(help="The GPU's memory in GB (10^9 bytes).")],
    pos: Annotated[int, typer.Option("--tokens", help="Tokens per prompt.")] = 64,
    pairs: Annotated[
        int | None, typer.Option(help="Pairs per step; by default as many as fit.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")
    ] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Say which batch fits a GPU with blocks recomputed, and what a step costs.

    A run also keeps the targets and references of its pairs, up to 4.3 GB. If these do not fit
    beside a forward pass, the plan says for how many pairs there is room.

    Example: tl-edgeprune plan --model gpt2 --gpu-memory 24
    """
    from tl_edgeprune.commands.jobs.plan import plan_text, planned_step

    if pos < 1 or (pairs is not None and pairs < 1):
        raise ValueError(f"--tokens {pos}, --pairs {pairs}: expected 1 or more.")
    if not math.isfinite(gpu_memory):
        raise ValueError(f"--gpu-memory {gpu_memory}: expected a number of GB.")
    planned = planned_step(model, gpu_memory, pos, pairs, dtype)
    print(json.dumps(planned) if as_json else plan_text(planned, gpu_memory, pairs))
