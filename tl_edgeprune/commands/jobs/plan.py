"""What `plan` says: the batch that fits a GPU, its memory and its operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tl_edgeprune.commands.common.options import BYTES
from tl_edgeprune.forward.cost_model import (
    PASSES,
    Shape,
    Work,
    find_shape,
    fitting_pairs,
    reference_bytes,
    step_bytes,
    step_floor,
)
from tl_edgeprune.runs.targets import MAX_BYTES

RESERVED = 2e9  # a GPU's own context and its libraries' workspaces


def planned_step(
    model: str, gpu_memory: float, pos: int, pairs: int | None, dtype: str
) -> dict[str, Any]:
    """The plan of a step, as plain values. Raises ValueError if one pair does not fit."""
    shape, element = find_shape(model), BYTES[dtype]
    room = int(gpu_memory * 1e9 - RESERVED)
    one_pair = Work(1, pos, element=element, on_gpu=True)
    largest = _largest_batch(shape, pos, room, element)
    if not largest:
        need = (sum(step_bytes(shape, one_pair).values()) + RESERVED) / 1e9
        half = "bfloat16, " if dtype == "float32" else ""
        raise ValueError(
            f"{model} in {dtype} does not fit: a forward pass of one pair of {pos} tokens takes "
            f"{need:.1f} GB, and the GPU has {gpu_memory:g} GB. Take {half}shorter prompts or a "
            "larger GPU."
        )
    n_pairs = pairs or largest
    passes = -(-n_pairs // largest)
    work = Work(-(-n_pairs // passes), pos, element=element, on_gpu=True)
    memory = step_bytes(shape, work)
    cache = min(MAX_BYTES, room - sum(memory.values()))
    memory |= {"targets, references": cache, "reserved": int(RESERVED)}
    cached_per_pair = reference_bytes(shape, one_pair) + one_pair.reads * shape.d_vocab * element
    floors = {name: floor_of(shape, work) for name, floor_of in PASSES.items()}
    floors |= {"one training step": step_floor(shape, work)}
    return {
        "model": model,
        "edges": shape.graph.n_edges,
        "dtype": dtype,
        "tokens_a_prompt": pos,
        "pairs_that_fit": largest,
        "batch_size": work.pairs,
        "accumulate": passes,
        "pairs_kept": cache // cached_per_pair,
        "bytes": {**memory, "in all": sum(memory.values())},
        "passes": {name: floor._asdict() for name, floor in floors.items()},
    }


def _largest_batch(shape: Shape, pos: int, room: int, element: int) -> int:
    """Pairs that fit beside all that a run may cache; if none do, those that fit without it."""
    for memory in (room - MAX_BYTES, room):
        largest = fitting_pairs(shape, pos, memory, element=element, on_gpu=True)
        if largest:
            return largest
    return 0


def plan_text(planned: Mapping[str, Any], gpu_memory: float, pairs: int | None) -> str:
    """The plan as text."""
    lines = [
        f"{planned['model']}: {planned['edges']:,} edges, {planned['dtype']}, prompts of "
        f"{planned['tokens_a_prompt']} tokens",
        f"At most {planned['pairs_that_fit']} pairs per forward pass fit into {gpu_memory:g} GB, "
        "with EdgePruner(recompute=True).",
    ]
    if pairs is not None:
        batch, accumulate = planned["batch_size"], planned["accumulate"]
        lines += [f"For {pairs} pairs per step: batch_size={batch}, accumulate={accumulate}."]
    stored, pairs_kept = planned["bytes"]["targets, references"] / 1e9, planned["pairs_kept"]
    if planned["bytes"]["targets, references"] < MAX_BYTES:
        lines += [
            f"That leaves {stored:.2f} GB of the {MAX_BYTES / 1e9:.1f} GB of targets and "
            f"references that a run may keep. Train on at most {pairs_kept:,} pairs, or on more "
            "than the run visits (steps × pairs per step), so that it keeps none; or use fewer "
            "pairs per forward pass (--pairs)."
        ]
    lines += [f"\nMemory of {planned['batch_size']} pairs per forward pass, GB:"]
    lines += [f"  {name:20}{size / 1e9:10.2f}" for name, size in planned["bytes"].items()]
    lines += ["\nThe minimum cost of each pass over these pairs:       TFLOP    GB moved"]
    for name, floor in planned["passes"].items():
        operations, moved = floor["operations"] / 1e12, floor["bytes"] / 1e9
        lines += [f"  {name:48}{operations:10.2f}{moved:12.1f}"]
    return "\n".join(lines)
