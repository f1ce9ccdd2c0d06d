"""Hold the brute force itself to first principles, model by model, before others are held to it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support import brute_force as bf
from support import model_zoo

from tl_edgeprune.graph.edge_graph import EdgeGraph

CASES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name in model_zoo.ARCHITECTURES
    for dtype in model_zoo.dtypes(name)
]
FINEST = [
    pytest.param(name, model_zoo.dtypes(name)[-1], id=name) for name in model_zoo.ARCHITECTURES
]
POST_NORM = {"bridge-gemma2", "bridge-gemma3", "bridge-olmo2", "hooked-gemma2"}


def pair(name: str, dtype: torch.dtype) -> tuple[Any, torch.Tensor, torch.Tensor, dict]:
    """A model, clean and corrupted tokens, and every source's output on the corrupted ones."""
    model = model_zoo.load(name, dtype)
    clean, corrupted = model_zoo.tokens(model, seed=0), model_zoo.tokens(model, seed=1)
    return model, clean, corrupted, bf.source_outputs(model, corrupted)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    tolerance = model_zoo.tolerance(name, expected.dtype)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", model_zoo.ARCHITECTURES)
def test_names_are_those_of_the_graph(name: str) -> None:
    model = model_zoo.load(name)
    graph = EdgeGraph(
        n_layers=model.cfg.n_layers,
        n_heads=model.cfg.n_heads,
        n_kv_heads=bf.n_kv_heads(model),
        has_mlp=not model.cfg.attn_only,
        parallel=model.cfg.parallel_attn_mlp,
    )
    assert bf.sources(model) == list(graph.sources)
    assert bf.destinations(model) == list(graph.destinations)
    assert bf.edges(model) == list(graph.edges)


@torch.no_grad()
@pytest.mark.parametrize("name, dtype", CASES)
def test_full_mask_is_the_model(name: str, dtype: torch.dtype) -> None:
    model, clean, _, replacement = pair(name, dtype)
    before = model(clean)
    actual = bf.masked_logits(model, clean, {}, replacement)
    assert actual.dtype == dtype
    assert_equal(actual, before, name)
    assert torch.equal(model(clean), before), "the run left something behind"


@torch.no_grad()
@pytest.mark.parametrize("name, dtype", CASES)
def test_empty_mask_is_the_corrupted_prompt(name: str, dtype: torch.dtype) -> None:
    model, clean, corrupted, replacement = pair(name, dtype)
    mask = dict.fromkeys(bf.edges(model), 0.0)
    assert_equal(bf.masked_logits(model, clean, mask, replacement), model(corrupted), name)


@torch.no_grad()
@pytest.mark.parametrize("name, dtype", CASES)
def test_sources_and_biases_add_up_to_the_residual_stream(name: str, dtype: torch.dtype) -> None:
    model = model_zoo.load(name, dtype)
    clean = model_zoo.tokens(model)
    point = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    stream = {}
    hook = (point, lambda x, hook: stream.__setitem__("last", x))
    model.run_with_hooks(clean, fwd_hooks=[hook])
    total = sum(bf.source_outputs(model, clean).values()) + sum(bf.output_biases(model))
    assert_equal(total, stream["last"], name)


@torch.no_grad()
@pytest.mark.parametrize("name, dtype", FINEST)
def test_path_patching_is_a_mask_with_one_zero(name: str, dtype: torch.dtype) -> None:
    model, clean, _, replacement = pair(name, dtype)
    full = model(clean)
    names = bf.edges(model)
    for destination in (r"<k>", r"m\d+", r"logits"):  # q and v: the next test
        candidates = [edge for edge in names if re.search(f"{destination}$", edge)]
        if not candidates:  # attention-only
            continue
        edge = candidates[2 * len(candidates) // 3]
        patched = bf.path_patch(model, clean, edge, replacement)
        assert_equal(patched, bf.masked_logits(model, clean, {edge: 0.0}, replacement), name)
        assert (patched - full).abs().max() > 1e-4, f"removing {edge} changes nothing"


@torch.no_grad()
@pytest.mark.parametrize("name, dtype", FINEST)
@pytest.mark.parametrize("which", "qkv")
def test_a_destination_cut_off_reads_the_corrupted_run(
    name: str, dtype: torch.dtype, which: str
) -> None:
    """All edges into one <q>, <k> or <v> cut: the projected vector is the corrupted run's."""
    model, clean, corrupted, replacement = pair(name, dtype)
    destination = [d for d in bf.destinations(model) if d.endswith(f"<{which}>")][-1]
    point = f"blocks.{model.cfg.n_layers - 1}.attn.hook_{which}"
    head = int(re.search(r"\.[a-z]+(\d+)", destination)[1])
    held = {}

    def keep(x: torch.Tensor, hook: Any) -> None:
        held["x"] = x.clone()

    def patch(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[:, :, head] = held["x"][:, :, head]
        return x

    model.run_with_hooks(corrupted, fwd_hooks=[(point, keep)])
    expected = model.run_with_hooks(clean, fwd_hooks=[(point, patch)])
    mask = {edge: 0.0 for edge in bf.edges(model) if edge.endswith(f"->{destination}")}
    assert_equal(bf.masked_logits(model, clean, mask, replacement), expected, name)


@torch.no_grad()
@pytest.mark.parametrize("name, dtype", [c for c in FINEST if c.id not in POST_NORM])
def test_a_source_cut_off_adds_nothing(name: str, dtype: torch.dtype) -> None:
    """All edges out of a head cut, under zero ablation: TransformerLens' own zeroing of its z."""
    model = model_zoo.load(name, dtype)
    clean, zeros = model_zoo.tokens(model), bf.zero_outputs(model)

    def zero_head(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[:, :, 2] = 0
        return z

    expected = model.run_with_hooks(clean, fwd_hooks=[("blocks.0.attn.hook_z", zero_head)])
    mask = {edge: 0.0 for edge in bf.edges(model) if edge.startswith("a0.h2->")}
    assert_equal(bf.masked_logits(model, clean, mask, zeros), expected, name)
    if not model.cfg.attn_only:
        hook = ("blocks.0.hook_mlp_out", lambda y, hook: torch.zeros_like(y))
        expected = model.run_with_hooks(clean, fwd_hooks=[hook])
        mask = {edge: 0.0 for edge in bf.edges(model) if edge.startswith("m0->")}
        assert_equal(bf.masked_logits(model, clean, mask, zeros), expected, name)


@pytest.mark.parametrize("name, dtype", FINEST)
def test_every_edge_matters_and_has_a_gradient(name: str, dtype: torch.dtype) -> None:
    """No edge of the zoo is dead, so that a mistake in any edge shows in the logits."""
    with torch.no_grad():
        model, clean, _, replacement = pair(name, dtype)
    names = bf.edges(model)
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(len(names), generator=generator, dtype=dtype).requires_grad_()
    logits = bf.masked_logits(model, clean, dict(zip(names, z.unbind(), strict=True)), replacement)
    weights = torch.randn(logits.shape, generator=generator, dtype=dtype)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), z)
    dead = [edge for edge, g in zip(names, gradient, strict=True) if not g.abs() > 1e-5]
    assert not dead


@pytest.mark.parametrize("name", sorted(set(model_zoo.ARCHITECTURES) - model_zoo.NO_FLOAT64))
def test_gradient_is_the_slope(name: str) -> None:
    with torch.no_grad():
        model, clean, _, replacement = pair(name, torch.float64)
    names = bf.edges(model)
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(len(names), generator=generator, dtype=torch.float64).requires_grad_()
    sizes = torch.rand(len(names), generator=generator, dtype=torch.float64) / len(names) ** 0.5

    def loss(at: torch.Tensor) -> torch.Tensor:
        logits = bf.masked_logits(
            model, clean, dict(zip(names, at.unbind(), strict=True)), replacement
        )
        return logits.log_softmax(-1)[..., 3].sum()

    (gradient,) = torch.autograd.grad(loss(z), z)
    direction = sizes * gradient.sign()  # no cancellation between edges
    with torch.no_grad():
        step = 1e-3 if name in model_zoo.FLOAT32_INSIDE else 1e-5
        slope = (loss(z + step * direction) - loss(z - step * direction)) / (2 * step)
    rtol = 3e-3 if name in model_zoo.FLOAT32_INSIDE else 1e-6
    torch.testing.assert_close(gradient @ direction, slope, rtol=rtol, atol=1e-7)


@torch.no_grad()
def test_masks_in_between_interpolate_at_the_destination() -> None:
    """Without norms the logits are linear in what they read, so in the masks of edges into them."""
    model, clean, _, replacement = pair("native-no-norm", torch.float64)
    edge = "a0.h1->logits"
    none, some, whole = (
        bf.masked_logits(model, clean, {edge: z}, replacement) for z in (0.0, 0.25, 1.0)
    )
    torch.testing.assert_close(some, 0.75 * none + 0.25 * whole, atol=1e-10, rtol=0)
    assert (whole - none).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["native-ln", "bridge-gemma2", "bridge-llama-gqa"])
def test_means(name: str) -> None:
    model = model_zoo.load(name)
    prompts = model_zoo.tokens(model, batch=3, pos=5)
    outputs = bf.source_outputs(model, prompts)
    flat, positional = (
        bf.mean_outputs(model, prompts),
        bf.mean_outputs(model, prompts, positional=True),
    )
    for source in bf.sources(model):
        y = outputs[source]
        torch.testing.assert_close(flat[source], y.mean((0, 1), keepdim=True), atol=1e-5, rtol=0)
        torch.testing.assert_close(positional[source], y.mean(0, keepdim=True), atol=1e-5, rtol=0)
    ragged = bf.mean_outputs(model, [prompts[0], prompts[1, :3]])
    kept = torch.cat([outputs["m0"][0], outputs["m0"][1, :3]])
    torch.testing.assert_close(ragged["m0"][0, 0], kept.mean(0), atol=1e-5, rtol=0)


def test_an_unknown_edge_is_refused() -> None:
    model = model_zoo.load("native-ln")
    clean, zeros = model_zoo.tokens(model), bf.zero_outputs(model)
    with pytest.raises(ValueError, match="a1.h0->a0.h0<q>"):
        bf.path_patch(model, clean, "a1.h0->a0.h0<q>", zeros)
    with pytest.raises(ValueError, match="m0->a0.h0<q>"):
        bf.masked_logits(model, clean, {"m0->a0.h0<q>": 0.0}, zeros)
