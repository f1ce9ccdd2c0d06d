"""The masked forward pass and its gradients, model by model, held to brute force.

`brute_force` overwrites each destination's input by TransformerLens' own split inputs, one edge at
a
time, in plain autograd; `masked` does none of that. Whatever both agree on, both define alike.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import brute_force as bf
from support import model_zoo
from torch import Tensor

from tl_edgeprune import Circuit, EdgeGraph, masked
from tl_edgeprune.ablation.kinds import ABLATIONS
from tl_edgeprune.ablation.reference import ZERO_WITH_BIASES
from tl_edgeprune.hooks.find import find_sites

# With TransformerLens 3, which has HookedTransformers besides, most of the Bridge's models are slow
# tests: with TransformerLens 4 they run every time.
OFTEN = {
    "bridge-gpt2",
    "bridge-llama-gqa",
    "bridge-gemma2",
    "bridge-olmo2",
    "bridge-gptj",
    "native-ln",
}
SLOW = {
    name
    for name in model_zoo.ARCHITECTURES
    if model_zoo.HookedTransformer is not None
    and not name.startswith("hooked")
    and name not in OFTEN
}


def marks(name: str, dtype: torch.dtype = torch.float64) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if name in SLOW and dtype == torch.float64 else []


CASES = [
    pytest.param(
        name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}", marks=marks(name, dtype)
    )
    for name in model_zoo.ARCHITECTURES
    for dtype in model_zoo.dtypes(name)
]
# float64 wherever the model itself computes in it: there brute force and mask agree to 1e-10.
FINEST = [
    pytest.param(name, model_zoo.dtypes(name)[-1], id=name, marks=marks(name))
    for name in model_zoo.ARCHITECTURES
]
# Each example costs a run by brute force, and each test has one for every architecture.
few = settings(max_examples=settings.default.max_examples // 4)
fewest = settings(max_examples=settings.default.max_examples // 8)
SEEDS = st.integers(2, 2**16)
DENSITIES = st.sampled_from([None, 0.1, 0.5, 0.9])  # None: numbers between 0 and 1


# --------------------------------------------------------------------------------------- helpers


def prompts(model: Any) -> list[Tensor]:
    """Prompts of mixed lengths, one longer than any that the tests run."""
    return [model_zoo.tokens(model, 1, pos, seed=40 + pos)[0] for pos in (8, 5, 7, 5)]


def options(model: Any, ablation: str, pos: int = 7, seed: int = 1) -> dict[str, Any]:
    """Keyword arguments of `masked`."""
    if ablation == "counterfactual":
        return {"corrupted": model_zoo.tokens(model, pos=pos, seed=seed)}
    if ablation in ("zero", ZERO_WITH_BIASES):
        return {"ablation": ablation}
    return {"ablation": ablation, "prompts": prompts(model)}


@functools.cache
def replacement(model: Any, ablation: str, pos: int = 7, seed: int = 1) -> Mapping[str, Tensor]:
    """What each source's removed edges carry, by brute force."""
    with torch.no_grad():
        match ablation:
            case "counterfactual":
                return bf.source_outputs(model, model_zoo.tokens(model, pos=pos, seed=seed))
            case "zero" | "zero-with-biases":
                return bf.zero_outputs(model)
            case "mean":
                return bf.mean_outputs(model, prompts(model))
    runs = [bf.source_outputs(model, prompt[None]) for prompt in prompts(model)]
    return {
        name: torch.stack(
            [
                torch.stack([run[name][0, p] for run in runs if run[name].shape[1] > p]).mean(0)
                for p in range(pos)
            ]
        )[None]
        for name in runs[0]
    }


def biases_in_heads(model: Any) -> dict[str, Any]:
    """For `bf.masked_logits`: each head writes its share of its block's output bias."""
    biases = bf.output_biases(model)

    def gated(source: str, y: Tensor) -> Tensor:
        block, _, head = source.partition(".")
        return y + biases[int(block[1:])] / model.cfg.n_heads if head else y

    return {"gated": gated, "reference_bias": [torch.zeros_like(bias) for bias in biases]}


def random_mask(model: Any, graph: EdgeGraph, seed: int, density: float | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(graph.n_edges, generator=generator, dtype=torch.float64)
    mask = uniform if density is None else (uniform < density).double()
    return mask.to(bf.output_biases(model)[0].dtype)


def by_name(graph: EdgeGraph, mask: Tensor) -> dict[str, Tensor]:
    return dict(zip(graph.edges, mask.unbind(), strict=True))


def assert_equal(actual: Tensor, expected: Tensor, name: str) -> None:
    tolerance = model_zoo.tolerance(name, expected.dtype)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def assert_gradients_equal(actual: Tensor, expected: Tensor, name: str) -> None:
    """Gradients pass through every rounding that the logits pass, and are of any size."""
    tolerance = (
        10 * model_zoo.tolerance(name, expected.dtype) * max(1.0, float(expected.abs().max()))
    )
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def logit_difference(logits: Tensor) -> Tensor:
    """A scalar that the answer's and the distractor's logits at the last position decide."""
    return (logits[:, -1, 3] - logits[:, -1, 5]).sum()


# ------------------------------------------------------------------------------------ all or none


@torch.no_grad()
@pytest.mark.parametrize("name, dtype", CASES)
def test_everything_kept_is_the_model(name: str, dtype: torch.dtype) -> None:
    model = model_zoo.load(name, dtype)
    clean = model_zoo.tokens(model)
    expected = model(clean)
    ones = torch.ones(EdgeGraph.from_model(model).n_edges, dtype=dtype)
    for ablation in list(ABLATIONS)[: None if dtype == model_zoo.dtypes(name)[-1] else 1]:
        with masked(model, ones, **options(model, ablation)):
            actual = model(clean)
        assert actual.dtype == dtype
        assert_equal(actual, expected, name)
        assert torch.equal(model(clean), expected), "the context left something behind"


@torch.no_grad()
@pytest.mark.parametrize("name, dtype", CASES)
def test_nothing_kept_is_the_corrupted_prompt(name: str, dtype: torch.dtype) -> None:
    model = model_zoo.load(name, dtype)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    graph = EdgeGraph.from_model(model)
    with masked(model, Circuit.from_edges(graph, []), corrupted=corrupted):
        actual = model(clean)
    assert_equal(actual, model(corrupted), name)


# ------------------------------------------------------------------------------------ brute force


@pytest.mark.parametrize("name, dtype", FINEST)
@few
@given(data=st.data())
@torch.no_grad()
def test_removing_one_edge_is_path_patching(
    name: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    model = model_zoo.load(name, dtype)
    graph, clean = EdgeGraph.from_model(model), model_zoo.tokens(model)
    read = data.draw(st.sampled_from(graph.reads))  # a drawn edge alone would rarely be the logits'
    edge = graph.edges[data.draw(st.integers(read.edges.start, read.edges.stop - 1))]
    expected = bf.path_patch(model, clean, edge, replacement(model, "counterfactual"))
    circuit = Circuit(graph, torch.tensor([name != edge for name in graph.edges]))
    with masked(model, circuit, **options(model, "counterfactual")):
        assert_equal(model(clean), expected, name)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name, dtype", FINEST)
@fewest
@given(seed=SEEDS, density=DENSITIES)
@torch.no_grad()
def test_a_random_mask_is_brute_force(
    name: str, dtype: torch.dtype, ablation: str, seed: int, density: float | None
) -> None:
    model = model_zoo.load(name, dtype)
    graph, clean = EdgeGraph.from_model(model), model_zoo.tokens(model)
    mask = random_mask(model, graph, seed, density)
    biases = {} if ablation != ZERO_WITH_BIASES else biases_in_heads(model)
    expected = bf.masked_logits(
        model, clean, by_name(graph, mask), replacement(model, ablation), **biases
    )
    with masked(model, mask, **options(model, ablation)):
        assert_equal(model(clean), expected, name)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bridge-llama-gqa", "native-ln"])
def test_masks_beyond_0_and_1_go_on_along_the_line(name: str) -> None:
    model = model_zoo.load(name, torch.float64)
    graph, clean = EdgeGraph.from_model(model), model_zoo.tokens(model)
    mask = 3 * random_mask(model, graph, 5) - 1
    replaced = replacement(model, "counterfactual")
    expected = bf.masked_logits(model, clean, by_name(graph, mask), replaced)
    with masked(model, mask, **options(model, "counterfactual")):
        assert_equal(model(clean), expected, name)


@torch.no_grad()
@pytest.mark.parametrize("name", [case.id for case in FINEST if not case.marks])
def test_masks_in_between_interpolate_linearly(name: str) -> None:
    """At the input of the last MLP and of the logits, in the edges that lead there."""
    model = model_zoo.load(name)
    graph, sites, clean = EdgeGraph.from_model(model), find_sites(model), model_zoo.tokens(model)
    points = {"logits": sites.final} | {
        f"m{layer}": mlp.read for layer, mlp in enumerate(sites.mlp)
    }
    mask = random_mask(model, graph, 0)
    with masked(model, mask, **options(model, "counterfactual")):
        for read in graph.reads[-2:]:
            destination = graph.destinations[read.first_destination]
            if destination not in points or (name.endswith("gptj") and destination != "logits"):
                # queries, keys and values: next test; GPT-J's MLP is handed a norm's output
                continue

            def seen(
                row: Tensor, point: str = points[destination], at: slice = read.edges
            ) -> Tensor:
                mask[at] = row
                return model.run_with_cache(clean, names_filter=point)[1][point]

            low, high = torch.rand(2, read.n_sources, generator=torch.Generator().manual_seed(1))
            kept, t = mask[read.edges].clone(), 0.3
            mix = (1 - t) * seen(low) + t * seen(high)
            assert_equal(seen((1 - t) * low + t * high), mix, name)
            mask[read.edges] = kept


# -------------------------------------------------------------------------------------- gradients


def brute_force_gradient(
    model: Any, graph: EdgeGraph, mask: Tensor, ablation: str = "counterfactual"
) -> Tensor:
    mask = mask.clone().requires_grad_()
    references = {name: y.detach() for name, y in replacement(model, ablation).items()}
    logits = bf.masked_logits(model, model_zoo.tokens(model), by_name(graph, mask), references)
    return torch.autograd.grad(logit_difference(logits), mask)[0]


def masked_gradient(model: Any, mask: Tensor, **kwargs: Any) -> Tensor:
    mask = mask.clone().requires_grad_()
    with masked(model, mask, **kwargs):
        return torch.autograd.grad(logit_difference(model(model_zoo.tokens(model))), mask)[0]


def eap_by_definition(model: Any) -> dict[str, Tensor]:
    """(ref_j - y_j) . d loss / d x_i at the destination's input, in the unmasked run."""
    clean, destinations = model_zoo.tokens(model), bf.destinations(model)
    own = bf.source_outputs(model, clean)
    reference = replacement(model, "counterfactual")
    probes = {name: torch.zeros_like(own["input"]).requires_grad_() for name in destinations}
    logits = bf.run(model, clean, lambda name, x: x + probes[name], lambda name, y: None)
    gradients = torch.autograd.grad(logit_difference(logits), list(probes.values()))
    at = dict(zip(destinations, gradients, strict=True))
    return {
        f"{source}->{destination}": ((reference[source] - own[source]) * at[destination]).sum()
        for destination, prefix in bf.reads(model).items()
        for source in prefix
    }


@pytest.mark.parametrize("name, dtype", FINEST)
def test_minus_the_gradient_at_one_is_eap(name: str, dtype: torch.dtype) -> None:
    model = model_zoo.load(name, dtype)
    graph = EdgeGraph.from_model(model)
    eap = eap_by_definition(model)
    ones = torch.ones(graph.n_edges, dtype=dtype)
    gradient = masked_gradient(model, ones, **options(model, "counterfactual"))
    expected = torch.stack([eap[edge] for edge in graph.edges]).detach()
    assert_gradients_equal(-gradient, expected, name)
    assert expected.abs().min() > 0


@pytest.mark.parametrize("ablation", ["counterfactual", "zero"])
@pytest.mark.parametrize("name, dtype", FINEST)
@few
@given(seed=SEEDS, density=DENSITIES)
def test_the_gradient_of_a_mask_is_autograds(
    name: str, dtype: torch.dtype, ablation: str, seed: int, density: float | None
) -> None:
    model = model_zoo.load(name, dtype)
    graph = EdgeGraph.from_model(model)
    mask = random_mask(model, graph, seed, density)
    actual = masked_gradient(model, mask, **options(model, ablation))
    assert_gradients_equal(actual, brute_force_gradient(model, graph, mask, ablation), name)


@pytest.mark.parametrize("name", ["bridge-llama-gqa", "native-ln"])
def test_a_mask_in_another_precision_gets_its_gradient_there(name: str) -> None:
    model = model_zoo.load(name, torch.float64)
    mask = random_mask(model, EdgeGraph.from_model(model), 0)
    wide = masked_gradient(model, mask, **options(model, "counterfactual"))
    narrow = masked_gradient(model, mask.float(), **options(model, "counterfactual"))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("name, dtype", FINEST)
@few
@given(seed=SEEDS, n=st.integers(1, 9))
def test_positions_choose_among_the_logits(
    name: str, dtype: torch.dtype, seed: int, n: int
) -> None:
    """In any order, also repeated; and the gradient is that of the chosen logits."""
    model = model_zoo.load(name, dtype)
    clean, graph = model_zoo.tokens(model), EdgeGraph.from_model(model)
    positions = torch.randint(7, (2, n), generator=torch.Generator().manual_seed(seed))
    results = []
    for wanted in (None, positions):
        mask = random_mask(model, graph, seed).requires_grad_()
        with masked(model, mask, **options(model, "counterfactual"), read_positions=wanted):
            logits = model(clean)
        if wanted is None:
            logits = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
        loss = (logits * weights).sum()
        results.append((logits.detach(), torch.autograd.grad(loss, mask)[0]))
    (expected, expected_gradient), (actual, gradient) = results
    assert_equal(actual, expected, name)
    assert_gradients_equal(gradient, expected_gradient, name)


# ------------------------------------------------------------------------------------ other graphs


@pytest.mark.parametrize("name, dtype", FINEST)
def test_one_destination_per_head_reads_for_query_key_and_value(
    name: str, dtype: torch.dtype
) -> None:
    model = model_zoo.load(name, dtype)
    if EdgeGraph.from_model(model).grouped:
        with pytest.raises(ValueError, match=r"Use split_qkv=True"):
            EdgeGraph.from_model(model, split_qkv=False)
        return
    graph, joint = (EdgeGraph.from_model(model, split_qkv=split) for split in (True, False))
    mask = random_mask(model, joint, 0)

    def joint_name(edge: str) -> str:
        return edge.partition("<")[0]

    places = torch.tensor([joint.index(joint_name(edge)) for edge in graph.edges])
    with torch.no_grad():
        split = mask[places]
        expected = bf.masked_logits(
            model,
            model_zoo.tokens(model),
            by_name(graph, split),
            replacement(model, "counterfactual"),
        )
        with masked(model, mask, **options(model, "counterfactual"), graph=joint):
            assert_equal(model(model_zoo.tokens(model)), expected, name)
    gradient = masked_gradient(model, mask, **options(model, "counterfactual"), graph=joint)
    parts = brute_force_gradient(model, graph, split)
    assert_gradients_equal(gradient, torch.zeros_like(mask).index_add(0, places, parts), name)


def with_embeddings(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Every source's output, the input as its two embeddings."""
    outputs = dict(bf.source_outputs(model, tokens))
    tok = model.run_with_cache(tokens, names_filter="hook_embed")[1]["hook_embed"]
    return outputs | {"tok": tok, "pos": outputs.pop("input") - tok}


def masked_logits_of_embeddings(
    model: Any, clean: Tensor, mask: Mapping[str, Tensor], references: Mapping[str, Tensor]
) -> Tensor:
    """`brute_force.masked_logits` with the sources tok and pos."""
    written, clean_outputs = {}, with_embeddings(model, clean)
    biases = bf.output_biases(model)

    def write(source: str, y: Tensor) -> None:
        written.update({"tok": clean_outputs["tok"], "pos": clean_outputs["pos"]})
        written[source] = y

    def read(destination: str, own: Tensor) -> Tensor:
        x = torch.zeros_like(own) + sum(biases[: bf.biases_before(model, destination)])
        names: Sequence[str] = bf.reads(model)[destination]
        for source in ("tok", "pos", *names[1:]):
            z = mask[f"{source}->{destination}"]
            x = x + z * written[source] + (1 - z) * references[source]
        return x

    return bf.run(model, clean, read, write)


@torch.no_grad()
@pytest.mark.parametrize("name, dtype", FINEST)
def test_token_and_position_embeddings_apart(name: str, dtype: torch.dtype) -> None:
    model = model_zoo.load(name, dtype)
    if not find_sites(model).has_positions:
        with pytest.raises(ValueError, match="needs learned position embeddings"):
            EdgeGraph.from_model(model, split_embeddings=True)
        return
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    graph = EdgeGraph.from_model(model, split_embeddings=True)
    mask = random_mask(model, graph, 0)
    expected = masked_logits_of_embeddings(
        model, clean, by_name(graph, mask), with_embeddings(model, corrupted)
    )
    with masked(model, mask, corrupted=corrupted, graph=graph):
        assert_equal(model(clean), expected, name)


@torch.no_grad()
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_embeddings_treated_alike_are_one_input(ablation: str) -> None:
    model, name = model_zoo.load("bridge-gpt2", torch.float64), "bridge-gpt2"
    clean = model_zoo.tokens(model)
    joint, graph = (EdgeGraph.from_model(model, split_embeddings=split) for split in (False, True))
    mask = random_mask(model, joint, 0)
    alike = mask[
        [
            joint.index(edge.replace("tok->", "input->").replace("pos->", "input->"))
            for edge in graph.edges
        ]
    ]
    with masked(model, mask, **options(model, ablation)):
        expected = model(clean)
    with masked(model, alike, **options(model, ablation), graph=graph):
        assert_equal(model(clean), expected, name)


# ------------------------------------------------------------------------- precisions, real weights


@pytest.mark.parametrize("name", [case.id for case in FINEST if not case.marks])
def test_bfloat16_models_run(name: str) -> None:
    if name in model_zoo.NO_FLOAT64:
        pytest.skip("its experts multiply by float32 weights whatever the dtype")
    model = model_zoo.build(name, torch.bfloat16)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    graph = EdgeGraph.from_model(model)
    with torch.no_grad():
        full, other = model(clean), model(corrupted)
    size = float(full.float().abs().max())
    mask = torch.ones(graph.n_edges, requires_grad=True)
    with masked(model, mask, corrupted=corrupted):
        kept = model(clean)
        assert kept.dtype == torch.bfloat16
        torch.testing.assert_close(kept.float(), full.float(), atol=0.1 * size, rtol=0)
        logit_difference(kept).backward()
        assert mask.grad is not None and mask.grad.isfinite().all() and mask.grad.any()
        with torch.no_grad():
            mask.zero_()
            torch.testing.assert_close(model(clean).float(), other.float(), atol=0.1 * size, rtol=0)


def test_real_weights(stories: Any) -> None:
    """stories260K, a trained Llama: both ends, a random mask, one edge, its gradient."""
    texts = [f"Once upon a time, {name} went to the park." for name in ("Lily", "Tom", "Anna")]
    prompts = [stories.to_tokens(text)[0] for text in texts]
    length = min(len(prompt) for prompt in prompts)
    clean = torch.stack([prompt[:length] for prompt in prompts])
    corrupted = clean.roll(1, 0)
    graph = EdgeGraph.from_model(stories)
    masks = [torch.ones(graph.n_edges), torch.zeros(graph.n_edges)]
    masks += [random_mask(stories, graph, seed, density) for seed, density in ((0, None), (1, 0.5))]
    with torch.no_grad():
        references = bf.source_outputs(stories, corrupted)
        expected = [stories(clean), stories(corrupted)]
        expected += [
            bf.masked_logits(stories, clean, by_name(graph, mask), references) for mask in masks[2:]
        ]
    for mask, logits in zip(masks, expected, strict=True):
        with torch.no_grad(), masked(stories, mask, corrupted=corrupted):
            torch.testing.assert_close(stories(clean), logits, atol=1e-3, rtol=0)  # logits to 20
    mask = masks[2].clone().requires_grad_()
    with masked(stories, mask, corrupted=corrupted):
        gradient = torch.autograd.grad(logit_difference(stories(clean)), mask)[0]
    other = masks[2].clone().requires_grad_()
    logits = bf.masked_logits(stories, clean, by_name(graph, other), references)
    brute_force = torch.autograd.grad(logit_difference(logits), other)[0]
    torch.testing.assert_close(gradient, brute_force, atol=1e-3, rtol=1e-3)
