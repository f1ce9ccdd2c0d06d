"""Plans held to models that are counted: parameters, edges, live bytes, and floating operations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tl_edgeprune.cli import main
from tl_edgeprune.forward.cost_model import (
    SHAPES,
    Shape,
    Work,
    find_shape,
    fitting_pairs,
    floors_table,
    masked_backward,
    masked_forward,
    memory_table,
    plain_forward,
    recompute_cost,
    reference_bytes,
    step_bytes,
)
from tl_edgeprune.forward.recompute import RecomputedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from scale import measure, random_model

TINY = ["tiny-gpt2", "tiny-llama"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs, pos", [(16, 16), (4, 64)])
@pytest.mark.parametrize("name", TINY)
def test_planned_bytes_are_those_counted(
    name: str, pairs: int, pos: int, dtype: torch.dtype
) -> None:
    shape, work = find_shape(name), Work(pairs, pos, element=dtype.itemsize)
    planned = step_bytes(shape, work)
    found = measure(shape, work, "cpu", dtype, steps=1)
    assert found["edges"] == shape.graph.n_edges
    assert sum(planned.values()) == pytest.approx(found["peak"], rel=0.15)


def counter() -> FlopCounterMode:
    """torch's counter of operations, which by itself passes over products added in place."""

    def added(into: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added})


@pytest.mark.parametrize("name", TINY)
def test_planned_operations_are_those_counted(name: str) -> None:
    shape, work = find_shape(name), Work(4, 16)
    model = random_model(shape, torch.float32, "cpu")
    clean, corrupted = torch.randint(shape.d_vocab, (2, 4, 16))
    with counter() as plain, torch.no_grad():
        model(clean)
    assert plain_forward(shape, work).operations == plain.get_total_flops()
    with RecomputedModel.attach(model, EdgeGraph.from_model(model)) as run:
        reference = run.reference("counterfactual", corrupted=corrupted)
        mask = torch.rand(run.graph.n_edges, requires_grad=True)
        run.halves.record(clean)
        with counter() as forward:
            logits = run(clean, mask, reference, torch.full((4, 1), 15))
        with counter() as backward:
            logits.sum().backward()
    assert masked_forward(shape, work).operations == forward.get_total_flops()
    planned = (recompute_cost(shape, work) + masked_backward(shape, work)).operations
    assert planned == pytest.approx(backward.get_total_flops(), rel=0.01)


def test_known_figures() -> None:
    assert SHAPES["gpt2"].graph.n_edges == 32_491
    assert SHAPES["smollm2-135m"].graph.n_edges == 70_651
    assert SHAPES["codellama-13b"].graph.n_edges == 3_877_661
    assert SHAPES["codellama-13b"].weights == pytest.approx(13.0e9, rel=0.01)
    assert SHAPES["llama-3-8b"].weights == pytest.approx(8.03e9, rel=0.01)
    with pytest.raises(ValueError, match="unknown shape 'gpt5': expected one of gpt2"):
        find_shape("gpt5")


@given(layers=st.integers(1, 6), heads=st.sampled_from([1, 2, 4]), memory=st.integers(10**5, 10**9))
def test_the_batch_that_fits_is_the_largest(layers: int, heads: int, memory: int) -> None:
    shape = Shape("any", layers, heads, 1, 16, 4, 32, 50)
    pairs = fitting_pairs(shape, 8, memory, element=4)
    if pairs:
        assert sum(step_bytes(shape, Work(pairs, 8)).values()) <= memory
    assert sum(step_bytes(shape, Work(pairs + 1, 8)).values()) > memory


@pytest.mark.parametrize(
    "name, work",
    [("gpt2", Work(8, 16)), ("codellama-13b", Work(32, 64, element=2, on_gpu=True))],
)
def test_the_page_says_what_the_module_says(name: str, work: Work) -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    shape = find_shape(name)
    assert floors_table(shape, work) in page
    assert memory_table(shape, work) in page


# --------------------------------------------------------------------------------- the command line


def test_plan_tells_batch_and_accumulation(capsys: Any) -> None:
    assert main("plan --model codellama-13b --gpu-memory 80 --pairs 32".split()) == 0
    told = capsys.readouterr().out
    assert "3,877,661 edges" in told and "accumulate=2" in told and "batch_size=16" in told


def test_a_plan_does_without_what_need_not_be_kept(capsys: Any) -> None:
    """GPT-2 in 6 GB: 0.6 GB for a pair, and no room for all 4.3 GB of targets and references."""
    shape, room = find_shape("gpt2"), 6e9 - 2e9
    plans = {}
    for pairs in (1, None):
        wanted = [] if pairs is None else ["--pairs", str(pairs)]
        assert main(["plan", "--model", "gpt2", "--gpu-memory", "6", *wanted]) == 0
        told = capsys.readouterr().out
        assert main(["plan", "--model", "gpt2", "--gpu-memory", "6", "--json", *wanted]) == 0
        plan = plans[pairs] = json.loads(capsys.readouterr().out)
        step = sum(step_bytes(shape, Work(plan["batch_size"], 64, element=2, on_gpu=True)).values())
        kept = plan["bytes"]["targets, references"]
        assert kept == int(room) - step and plan["bytes"]["in all"] == 6e9
        assert f"That leaves {kept / 1e9:.2f} GB" in told
        assert f"at most {plan['pairs_kept']:,} pairs" in told
        pair = reference_bytes(shape, Work(1, 64, element=2)) + 2 * shape.d_vocab
        assert plan["pairs_kept"] * pair <= kept < (plan["pairs_kept"] + 1) * pair
    assert plans[1]["batch_size"] == 1 < plans[None]["batch_size"] == plans[1]["pairs_that_fit"]
    assert main("plan --model gpt2 --gpu-memory 24".split()) == 0
    assert "are left" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (
            "plan --model codellama-13b --gpu-memory 24",
            1,
            "does not fit: a forward pass of one pair",
        ),
        ("plan --model nope --gpu-memory 24", 1, "unknown shape 'nope'"),
        ("plan --model gpt2 --gpu-memory 24 --tokens 0", 1, "expected 1 or more"),
        ("plan --model gpt2", 2, "gpu-memory"),
        ("demo --task nope", 2, "ioi-t1"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    arguments: str, code: int, message: str, capsys: Any
) -> None:
    assert main(arguments.split()) == code
    assert message in capsys.readouterr().err
