"""`tl-edgeprune plan`: what a step takes, before it is run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from tl_edgeprune.commands.common.errors import told
from tl_edgeprune.commands.common.options import BYTES, Json

RESERVED = 2e9  # a GPU's own context and its libraries' workspaces


@told
def plan(
    model: Annotated[str, typer.Option(help="gpt2, smollm2-135m, llama-3-8b or codellama-13b.")],
    gpu_memory: Annotated[float, typer.Option(help="The GPU's memory in GB (10^9 bytes).")],
    pos: Annotated[int, typer.Option("--tokens", help="Tokens of a prompt.")] = 64,
    pairs: Annotated[int | None, typer.Option(help="Pairs a step; else what fits.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")
    ] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Say which batch fits a GPU with blocks recomputed, and what a step takes.

    A run also keeps the targets and references of its pairs, up to 4.3 GB of them. Where that does
    not fit beside a forward, the plan does without, and says for how many pairs there is room.

    Example: tl-edgeprune plan --model gpt2 --gpu-memory 24
    """
    from tl_edgeprune.forward.cost_model import (
        PASSES,
        Work,
        find_shape,
        fitting_pairs,
        reference_bytes,
        step_bytes,
        step_floor,
    )
    from tl_edgeprune.runs.targets import MAX_BYTES

    shape, element = find_shape(model), BYTES[dtype]
    if pos < 1 or (pairs is not None and pairs < 1):
        raise ValueError(f"--tokens {pos}, --pairs {pairs}: expected 1 or more.")
    if not math.isfinite(gpu_memory):
        raise ValueError(f"--gpu-memory {gpu_memory}: expected a number of GB.")
    room = int(gpu_memory * 1e9 - RESERVED)
    rooms = (room - MAX_BYTES, room)  # with all that a run may keep beside it, and without
    fitting = (fitting_pairs(shape, pos, room, element=element, on_gpu=True) for room in rooms)
    largest = next((pairs for pairs in fitting if pairs), 0)
    least = Work(1, pos, element=element, on_gpu=True)
    if not largest:
        need = (sum(step_bytes(shape, least).values()) + RESERVED) / 1e9
        half = "bfloat16, " if dtype == "float32" else ""
        raise ValueError(
            f"{model} in {dtype} does not fit: one pair of {pos} tokens a forward takes {need:.1f} "
            f"GB, and {gpu_memory:g} GB are there. Take {half}shorter prompts or a larger GPU."
        )
    n_pairs = pairs or largest
    forwards = -(-n_pairs // largest)
    work = Work(-(-n_pairs // forwards), pos, element=element, on_gpu=True)
    memory = step_bytes(shape, work)
    cache = min(MAX_BYTES, room - sum(memory.values()))
    memory |= {"targets, references": cache, "reserved": int(RESERVED)}
    a_pair = reference_bytes(shape, least) + least.reads * shape.d_vocab * element
    floors = {name: passed(shape, work) for name, passed in PASSES.items()}
    floors |= {"one training step": step_floor(shape, work)}
    planned = {
        "model": model,
        "edges": shape.graph.n_edges,
        "dtype": dtype,
        "tokens_a_prompt": pos,
        "pairs_that_fit": largest,
        "batch_size": work.pairs,
        "accumulate": forwards,
        "pairs_kept": cache // a_pair,
        "bytes": {**memory, "in all": sum(memory.values())},
        "passes": {name: floor._asdict() for name, floor in floors.items()},
    }
    print(json.dumps(planned) if as_json else _text(planned, gpu_memory, pairs))


def _text(planned: Mapping[str, Any], gpu_memory: float, pairs: int | None) -> str:
    from tl_edgeprune.runs.targets import MAX_BYTES

    lines = [
        f"{planned['model']}: {planned['edges']:,} edges, {planned['dtype']}, prompts of "
        f"{planned['tokens_a_prompt']} tokens",
        f"At most {planned['pairs_that_fit']} pairs a forward fit into {gpu_memory:g} GB, with "
        "EdgePruner(recompute=True).",
    ]
    if pairs is not None:
        batch, accumulate = planned["batch_size"], planned["accumulate"]
        lines += [f"For {pairs} pairs a step: batch_size={batch}, accumulate={accumulate}."]
    stored, pairs_kept = planned["bytes"]["targets, references"] / 1e9, planned["pairs_kept"]
    if planned["bytes"]["targets, references"] < MAX_BYTES:
        lines += [
            f"Beside them {stored:.2f} GB are left, of the {MAX_BYTES / 1e9:.1f} GB of targets and "
            f"references that a run may keep: train on at most {pairs_kept:,} pairs, or on more "
            "than the run visits (steps × pairs a step), of which it keeps none; or take fewer a "
            "forward (--pairs)."
        ]
    lines += [f"\nMemory of {planned['batch_size']} pairs a forward, GB:"]
    lines += [f"  {name:20}{size / 1e9:10.2f}" for name, size in planned["bytes"].items()]
    lines += ["\nThe least that each pass of a forward's pairs does:   TFLOP    GB moved"]
    for name, floor in planned["passes"].items():
        operations, moved = floor["operations"] / 1e12, floor["bytes"] / 1e9
        lines += [f"  {name:48}{operations:10.2f}{moved:12.1f}"]
    return "\n".join(lines)
