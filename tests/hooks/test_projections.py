"""How heads read and write, held to the definitions; and work that is skipped in masked runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.model_zoo import ARCHITECTURES, build
from torch import Tensor

from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.hooks import projections
from tl_edgeprune.hooks.find import find_sites
from tl_edgeprune.hooks.norms import LayerNorm, RMSNorm, identity
from tl_edgeprune.hooks.projections import project_naive
from tl_edgeprune.hooks.sites import AttentionSite, PostNorm
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


def read_naive(x: Tensor, where: AttentionSite, split_qkv: bool) -> list[Tensor]:
    return project_naive(x, where.norm, where.weights, where.biases, split_qkv)


def gradient(x: Tensor, qkv: list[Tensor], grads: list[Tensor]) -> Tensor:
    loss = sum((heads * grad).sum() for heads, grad in zip(qkv, grads, strict=True))
    return torch.autograd.grad(loss, x)[0]


def site_arguments(counts: st.SearchStrategy) -> st.SearchStrategy:
    """Arguments of `site`."""
    kinds, widths, seeds = st.sampled_from(NORMS), st.integers(1, 6), st.integers(0, 999)
    return st.tuples(kinds, counts, widths, st.booleans(), seeds)


GROUPED = st.tuples(st.integers(1, 4), st.integers(1, 3)).map(lambda n: (n[0], n[1], n[1]))
UNGROUPED = st.integers(1, 4).map(lambda n: (n, n, n))
# A site's arguments, and whether queries, keys and values have a destination each.
CASES = st.one_of(
    st.tuples(site_arguments(GROUPED), st.just(True)),
    st.tuples(site_arguments(UNGROUPED), st.just(False)),
)
Case = tuple[tuple[str, tuple[int, int, int], int, bool, int], bool]


def n_destinations(where: AttentionSite, split_qkv: bool) -> int:
    return sum(len(w) for w in where.weights) if split_qkv else len(where.output)


@given(CASES, st.integers(1, 5), st.integers(0, 999))
def test_heads_are_read_as_the_definition_says(case: Case, rows: int, seed: int) -> None:
    where, split_qkv = site(*case[0]), case[1]
    shape = (n_destinations(where, split_qkv), rows, where.output.shape[-1])
    x, y = (normal(*shape, seed=seed).requires_grad_() for _ in range(2))
    fast, slow = where.read(x, split_qkv), read_naive(y, where, split_qkv)
    torch.testing.assert_close(fast, slow)
    grads = [normal(*heads.shape, seed=seed + i) for i, heads in enumerate(slow)]
    torch.testing.assert_close(gradient(x, fast, grads), gradient(y, slow, grads))


@given(CASES, st.integers(1, 5), st.integers(1, 60), st.integers(0, 999))
def test_heads_are_read_in_pieces_as_the_definition_says(
    case: Case, rows: int, piece: int, seed: int
) -> None:
    where, split_qkv = site(*case[0]), case[1]
    x = normal(n_destinations(where, split_qkv), rows, where.output.shape[-1], seed=seed)
    y = x.clone().requires_grad_()
    slow = read_naive(y, where, split_qkv)
    grads = [normal(*heads.shape, seed=seed + i) for i, heads in enumerate(slow)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projections, "PIECE", piece)
        torch.testing.assert_close(where.read_in_pieces(x, split_qkv), slow)
        where.read_in_pieces_back(x, grads, split_qkv)
    torch.testing.assert_close(x, gradient(y, slow, grads))


@given(CASES, st.data(), st.integers(0, 999))
def test_some_destinations_are_read_as_the_definition_says(
    case: Case, data: st.DataObject, seed: int
) -> None:
    where, split_qkv = site(*case[0]), case[1]
    n = n_destinations(where, split_qkv)
    chosen = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    x = normal(n, 2, where.output.shape[-1], seed=seed)
    expected = read_naive(x, where, split_qkv)
    actual = [torch.zeros_like(heads) for heads in expected]
    for index, heads, values in where.read_some(x[chosen], chosen, split_qkv):
        actual[index][heads] = values
    first = 0
    for heads, values in zip(expected, actual, strict=True):
        read = [d - first in range(len(heads)) and d - first for d in chosen]
        kept = [head for head in read if head is not False]
        torch.testing.assert_close(values[kept], heads[kept])
        assert not values[[head for head in range(len(heads)) if head not in kept]].any()
        first += len(heads) if split_qkv else 0


def write_naive(z: Tensor, where: AttentionSite, bias_in_heads: bool) -> Tensor:
    """The definition: each head's z times its W_O and the gain, plus its share of the bias."""
    y = torch.stack([z[head] @ where.output[head] for head in range(len(z))])
    y = y if where.post is None else y * where.post.gain
    return y + where.output_bias / len(where.output) if bias_in_heads else y


@given(
    site_arguments(GROUPED),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 999),
)
def test_heads_write_as_the_definition_says(
    arguments: tuple, rows: int, gain: bool, bias: bool, bias_in_heads: bool, seed: int
) -> None:
    where = site(*arguments)
    n_heads, d_head, d_model = where.output.shape
    where = replace(
        where,
        post=PostNorm(normal(d_model, seed=seed + 1), 1e-5) if gain else None,
        output_bias=normal(d_model, seed=seed + 2) if bias else None,
    )
    in_heads = bias and bias_in_heads
    z = normal(n_heads, rows, d_head, seed=seed).requires_grad_()
    expected = write_naive(z, where, in_heads)
    out = torch.empty(n_heads, rows, d_model, dtype=z.dtype)
    where.write(z.detach(), out, bias_in_heads=bias_in_heads)
    torch.testing.assert_close(out, expected.detach())

    grad = normal(*out.shape, seed=seed + 3)
    torch.testing.assert_close(where.write_back(grad), torch.autograd.grad(expected, z, grad)[0])
    torch.testing.assert_close(
        where.write_dot(z.detach(), grad, bias_in_heads=bias_in_heads), (out * grad).sum(1)
    )

    last = slice(n_heads - 1, n_heads)
    where.write(z.detach()[last], out[last], bias_in_heads=bias_in_heads, heads=last)
    torch.testing.assert_close(out, expected.detach())

    stream = normal(rows, d_model, seed=seed + 4)
    after = stream + write_naive(z.detach(), where, False).sum(0)
    after = after if where.output_bias is None else after + where.output_bias
    torch.testing.assert_close(where.stream_after(stream, z.detach().transpose(0, 1)), after)


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
        narrow.read(x, True), read_naive(x.double(), where, True), strict=True
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
    for actual, expected in zip(rough.read(x, True), read_naive(x, rough, True), strict=True):
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
