"""What `--dry-run` says: edges, pairs, steps, memory and time of a run that is not made.

No weights are loaded. Sizes come from the model's config, the prompts' length from the task's own
pairs where its tokenizer is on this machine, bytes and operations from the planner, and the
machine's speed from a product and a copy that are made for it. Work done at that speed is an
estimate of the time from below: a run takes longer. Where the length had to be assumed it is none,
and the time is called about so much.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from tl_edgeprune.circuits.circuit import check_budget
from tl_edgeprune.commands.common.inputs import Inputs
from tl_edgeprune.commands.common.options import BYTES
from tl_edgeprune.commands.common.run_folder import Run
from tl_edgeprune.commands.jobs.model_shapes import shape_of
from tl_edgeprune.commands.jobs.prompt_lengths import Lengths, prompt_lengths
from tl_edgeprune.forward.cost_model import (
    Floor,
    Shape,
    Work,
    eap,
    masked_backward,
    masked_forward,
    one_circuit,
    recompute_cost,
    reference_run,
    step_bytes,
)
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.methods.registry import find_method

UNKNOWN = "known once it is loaded"


def plan_of_prune(run: Run, tokens: int | None) -> dict[str, Any]:
    """What a run of Edge Pruning would be. tokens: of a prompt; None for those of the task."""
    lengths = _lengths(run.inputs, tokens)
    settings, shape = run.settings, shape_of(run.inputs.model)
    graph = None if shape is None or settings["positions"] else _graph(shape, settings)
    _check(graph, [settings["n_edges"]])
    plan = _common(run.inputs, graph, lengths) | {
        "n_edges": settings["n_edges"],
        "steps": settings["steps"],
        "pairs_a_step": settings["batch_size"] * settings["accumulate"],
    }
    if shape is None:
        return plan | {"bytes_with_recompute": None, _seconds_name(lengths): None}
    work = _work(run.inputs, settings["batch_size"], lengths.mean)
    floor = _steps(shape, work, settings["steps"] * settings["accumulate"], settings["recompute"])
    floor += _judging(run.inputs, shape, lengths.mean, 1)
    memory = step_bytes(shape, _work(run.inputs, settings["batch_size"], lengths.longest))
    return plan | {
        "bytes_with_recompute": {**memory, "in all": sum(memory.values())},
        _seconds_name(lengths): _seconds(run.inputs, floor),
    }


def plan_of_discover(
    inputs: Inputs,
    methods: Mapping[str, Mapping[str, Any]],
    sizes: Iterable[int],
    tokens: int | None,
) -> dict[str, Any]:
    """What runs of these methods would be, their settings by name. tokens: as of `pruning`."""
    lengths = _lengths(inputs, tokens)
    sizes, shape = list(sizes), shape_of(inputs.model)
    in_spans = any(
        values.get("positions") for values in methods.values()
    )  # as many edges as in the task
    graph = None if shape is None or in_spans else shape.graph
    _check(graph, sizes)
    plan = _common(inputs, graph, lengths) | {"methods": list(methods), "sizes": sizes}
    plan["steps"] = {name: _count(name, values, "steps") for name, values in methods.items()}
    if shape is None:
        return plan | {_seconds_name(lengths): None}
    seconds = {}
    for name, values in methods.items():
        floor = _finding(name, values, inputs, shape, lengths.mean)
        evaluation_seconds = _judging(inputs, shape, lengths.mean, len(sizes))
        seconds[name] = None if floor is None else _seconds(inputs, floor + evaluation_seconds)
    return plan | {_seconds_name(lengths): seconds}


def show_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    """Print it, as text or as one JSON object."""
    if as_json:
        print(json.dumps(plan))
        return
    for name, value in plan.items():
        if name == "tokens_are_known":
            if not value:
                print("tokens were assumed: give --tokens, or a model whose tokenizer is here")
        elif isinstance(value, Mapping):
            print(f"{_words(name)}:")
            for key, number in value.items():
                print(f"  {key:20}{_shown(name, number, 'not known beforehand')}")
        else:
            print(f"{_words(name):22}{_shown(name, value, UNKNOWN)}")
    print("\nNothing was run.")


# --------------------------------------------------------------------------------------- the parts


def _graph(shape: Shape, settings: Mapping[str, Any]) -> EdgeGraph:
    return EdgeGraph(
        shape.n_layers,
        shape.n_heads,
        shape.n_kv_heads,
        split_qkv=settings["split_qkv"],
        split_embeddings=settings["split_embeddings"] and shape.n_ctx > 0,
    )


def _lengths(inputs: Inputs, tokens: int | None) -> Lengths:
    if tokens is not None and tokens < 1:
        raise ValueError(f"--tokens {tokens}: expected 1 or more.")
    return prompt_lengths(inputs, tokens)


def _seconds_name(lengths: Lengths) -> str:
    return "seconds_at_least" if lengths.known else "seconds_about"


def _check(graph: EdgeGraph | None, sizes: Iterable[int | None]) -> None:
    for size in sizes:
        if graph is not None and size is not None:
            check_budget(size, graph)


def _common(inputs: Inputs, graph: EdgeGraph | None, lengths: Lengths) -> dict[str, Any]:
    pairs = inputs.n_pairs()
    held_out = round(pairs * inputs.held_out)
    return {
        "model": inputs.model,
        "task": inputs.task,
        "device": inputs.device,
        "dtype": inputs.dtype,
        "edges": None if graph is None else graph.n_edges,
        "pairs_found_on": pairs - held_out,
        "pairs_judged_on": held_out,
        "tokens_a_prompt": lengths.mean,
        "tokens_of_the_longest": lengths.longest,
        "tokens_are_known": lengths.known,
    }


def _work(inputs: Inputs, pairs: int, pos: int) -> Work:
    on_gpu = str(inputs.device).startswith("cuda")
    return Work(pairs, pos, element=BYTES[inputs.dtype], on_gpu=on_gpu)


def _steps(shape: Shape, work: Work, steps: int, recompute: bool) -> Floor:
    """So many forwards and backwards, the reference recorded anew for each."""
    floor = reference_run(shape, work) + masked_forward(shape, work) + masked_backward(shape, work)
    return _times(floor + recompute_cost(shape, work) if recompute else floor, steps)


def _finding(
    method: str, settings: Mapping[str, Any], inputs: Inputs, shape: Shape, pos: int
) -> Floor | None:
    """A method's work; None where it shows in the run alone."""
    record = find_method(method)
    batch = _count(method, settings, "batch_size") or 8
    steps = _count(method, settings, "steps")
    work = _work(inputs, batch, pos)
    if record.trained:
        forwards = (steps or 1) * (_count(method, settings, "accumulate") or 1)
        return _steps(shape, work, forwards, bool(settings.get("recompute")))
    gradients = record.gradients
    if isinstance(gradients, str):
        gradients = _count(method, settings, gradients)
    if gradients is None:
        return None
    pairs = inputs.n_pairs() - round(inputs.n_pairs() * inputs.held_out)
    return _times(eap(shape, work), gradients * -(-pairs // batch))


def _judging(inputs: Inputs, shape: Shape, pos: int, circuits: int) -> Floor:
    pairs = round(inputs.n_pairs() * inputs.held_out)
    return _times(one_circuit(shape, _work(inputs, max(1, pairs), pos)), circuits)


def _count(method: str, settings: Mapping[str, Any], name: str) -> int | None:
    """A setting of the method, or its default; None where it has none."""
    default = find_method(method).parameters.get(name)
    return settings.get(name, None if default is None else default.default)


def _times(floor: Floor, count: int) -> Floor:
    return Floor(floor.operations * count, floor.bytes * count)


# ------------------------------------------------------------------------------ the machine's speed


def _seconds(inputs: Inputs, floor: Floor) -> float:
    return floor.seconds(*_speeds(str(inputs.device), inputs.dtype))


def _speeds(device: str, dtype: str) -> tuple[float, float]:
    """Operations and bytes a second: of a product, and of a copy."""
    size = 4096 if device.startswith("cuda") else 512
    a = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    long = torch.ones(2**25, device=device, dtype=torch.uint8)
    product = _fastest(lambda: a @ a, device)
    copy = _fastest(long.clone, device)
    return 2 * size**3 / product, 2 * len(long) / copy


def _fastest(work: Callable[[], Any], device: str) -> float:
    times = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


# ------------------------------------------------------------------------------------------ as text


def _words(name: str) -> str:
    return "edges to keep" if name == "n_edges" else name.replace("_", " ")


def _shown(name: str, value: Any, unknown: str) -> str:
    if value is None:
        return unknown
    if name.startswith("bytes"):
        return f"{value / 1e6:12,.1f} MB"
    if name.startswith("seconds"):
        return f"{value:,.1f} (an estimate: this machine's speed, the least work)"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
