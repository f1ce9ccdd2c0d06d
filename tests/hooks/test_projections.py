"""Queries, keys and values by the fast paths, held to their definition; and idle work left out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.model_zoo import ARCHITECTURES, build
from torch import Tensor

from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.hooks.find import find_sites
from tl_edgeprune.hooks.norms import LayerNorm, RMSNorm, identity
from tl_edgeprune.hooks.projections import project, project_naive
from tl_edgeprune.hooks.sites import AttentionSite
from tl_edgeprune.hooks.unused_work import idle_work, replaced

NORMS = ("rms", "rms without gain", "layer norm", "none")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def site(kind: str, counts: tuple[int, ...], width: int, bias: bool, seed: int) -> AttentionSite:
    gain = normal(width, seed=seed + 1)
    norm = {
        "rms": RMSNorm(gain, 1e-5, float32=False),
        "rms without gain": RMSNorm(None, 1e-5, float32=False),
        "layer norm": LayerNorm(gain, normal(width, seed=seed + 2), 1e-5),
        "none": identity,
    }[kind]
    weights = tuple(normal(n, width, 3, seed=seed + 3 + i) for i, n in enumerate(counts))
    biases = tuple(normal(n, 3, seed=seed + 6 + i) if bias else None for i, n in enumerate(counts))
    output = normal(counts[0], 3, width, seed=seed + 9)
    return AttentionSite("q", "k", "v", "z", norm, weights, biases, output, None, None)


@given(
    st.sampled_from(NORMS),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 999),
)
def test_projections_are_those_of_the_definition(
    kind: str, heads: int, kv_heads: int, width: int, rows: int, bias: bool, seed: int
) -> None:
    where = site(kind, (heads, kv_heads, kv_heads), width, bias, seed)
    inputs = [normal(heads + 2 * kv_heads, rows, width, seed=seed + 20) for _ in range(2)]
    for x in inputs:
        x.requires_grad_()
    fast, slow = project(inputs[0], where, True), project_naive(inputs[1], where, True)
    for parts in (fast, slow):
        sum(
            (p * normal(*p.shape, seed=seed + 30 + i)).sum() for i, p in enumerate(parts)
        ).backward()
    for actual, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_projections_in_a_low_precision_are_near_those_in_a_high_one(dtype: torch.dtype) -> None:
    where = site("rms", (4, 2, 2), 64, True, 0)
    narrow = AttentionSite(
        "q",
        "k",
        "v",
        "z",
        RMSNorm(where.norm.weight.to(dtype), 1e-5, float32=True),
        tuple(w.to(dtype) for w in where.weights),
        tuple(b.to(dtype) for b in where.biases),
        where.output.to(dtype),
        None,
        None,
    )
    x = (100 * normal(8, 5, 64, seed=1)).to(dtype)
    for actual, expected in zip(
        project(x, narrow, True), project_naive(x.double(), where, True), strict=True
    ):
        assert actual.dtype == dtype
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < (0.02 if dtype == torch.bfloat16 else 1e-6)


def test_a_norm_that_computes_in_less_than_its_input_is_called() -> None:
    """As transformers does for float64: the fused path would be more precise than the model."""
    where = site("rms", (2, 1, 1), 8, False, 0)
    rough = AttentionSite(
        "q", "k", "v", "z", RMSNorm(None, 1e-5, float32=True), where.weights, where.biases,
        where.output, None, None,
    )  # fmt: skip
    x = normal(4, 3, 8, seed=5)
    for actual, expected in zip(
        project(x, rough, True), project_naive(x, rough, True), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "name", [n for n in ("bridge-gpt2", "hooked-gpt2-ln") if n in ARCHITECTURES]
)
def test_a_masked_run_leaves_the_models_own_projections_out(name: str) -> None:
    model = build(name)
    sites = find_sites(model)
    idle = idle_work(model.blocks[0], norm_precedes=True, parallel=sites.parallel)
    assert idle, f"{name}: nothing to leave out"
    calls = {"plain": 0, "masked": 0}
    tokens = torch.arange(6)[None] + 3

    def counted(owner: object, method: str, key: str):
        own = getattr(owner, method)

        def call(*args: object, **kwargs: object) -> object:
            calls[key] += 1
            return own(*args, **kwargs)

        return replaced(owner, method, call)

    with counted(idle[0][0], idle[0][1], "plain"):
        model(tokens)
    with MaskedModel.attach(model) as run, counted(idle[0][0], idle[0][1], "masked"):
        reference, _ = run.record(tokens)
        assert calls == {"plain": 1, "masked": 1}  # a recording is the model's own run
        run(tokens, torch.ones(run.graph.n_edges), reference)
    assert calls == {"plain": 1, "masked": 1}
    assert "forward" not in vars(idle[0][0])


def test_a_replaced_method_is_put_back_after_an_exception() -> None:
    module = torch.nn.Linear(2, 2)
    with pytest.raises(KeyError), replaced(module, "forward", lambda x: x):
        assert module(torch.ones(2)).sum() == 2
        raise KeyError
    assert "forward" not in vars(module)
