"""Every family that people ask for, in every class: right by four statements, or refused by name.

The page "What is supported" is held to the same: each of its cells is one test here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import brute_force as bf
from support import family_configs, model_families, model_zoo
from support.model_families import FAMILIES, OTHERS, REFUSED, Family, Refused
from support.support_claims import Statements
from torch import Tensor

from tl_edgeprune import EdgeGraph, masked
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.forward.recompute import RecomputedModel

SCRIPT = Path(__file__).parents[2] / "scripts" / "supported_models.py"
spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
page_maker: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page_maker)

PAGE = page_maker.PAGE.read_text(encoding="utf-8")
HAS_HOOKED = model_zoo.HookedTransformer is not None
# With TransformerLens 3, which has HookedTransformers besides, Bridges are slow tests: with
# TransformerLens 4 they run every time.
SLOW_BRIDGE = [pytest.mark.slow] if HAS_HOOKED else []
CELLS = [
    pytest.param(
        *(family, column, cls),
        id=f"{cls}-{family.name}",
        marks=[pytest.mark.slow] if family in OTHERS else SLOW_BRIDGE if cls == "bridge" else [],
    )
    for column, (version, cls) in page_maker.COLUMNS.items()
    if version == page_maker.installed()
    for family in FAMILIES + OTHERS
]
# The zoo's own architectures are held to more, one by one, in the other files.
MORE = [f"bridge-{name}" for name in family_configs.BRIDGE]
MORE += [f"hooked-{name}" for name in family_configs.HOOKED] if HAS_HOOKED else []
MORE = sorted(set(MORE) - {kind.model for kind in REFUSED})
SCALED_LOGITS = {"bridge-cohere"}  # after the unembedding, which a run by halves does not see


# --------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("family, column, cls", CELLS)
def test_a_family_is_what_the_page_says(family: Family, column: str, cls: str) -> None:
    """And right by the four statements of `statements.py`, where that is yes."""
    assert model_families.verdict(family, cls) == page_maker.cells(PAGE)[family.name, column]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=kind.model, marks=SLOW_BRIDGE) for kind in REFUSED]
)
def test_a_kind_is_refused_as_the_page_says(kind: Refused) -> None:
    row = [kind.name, kind.examples, model_families.reason(kind)]
    assert row in page_maker.rows(page_maker.section(PAGE, "refused"))


def test_the_page_has_these_rows_and_no_others() -> None:
    cells = page_maker.cells(PAGE)
    assert page_maker.supported(cells) == page_maker.section(PAGE, "supported")
    assert set(cells.values()) == {"yes", "no", "–"}
    refused = page_maker.rows(page_maker.section(PAGE, "refused"))[2:]
    assert [row[:2] for row in refused] == [[kind.name, kind.examples] for kind in REFUSED]


def test_what_is_asked_for_most_is_nowhere_refused() -> None:
    cells = page_maker.cells(PAGE)
    names = [family.name for family in FAMILIES]
    assert {cell for (name, _), cell in cells.items() if name in names} == {"yes", "–"}
    assert [key for key, cell in cells.items() if key[0] in names and cell == "–"] == [
        ("SoLU", "TransformerBridge 3.9")
    ]


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=kind.model, marks=SLOW_BRIDGE) for kind in REFUSED]
)
def test_a_refusal_names_the_model_and_comes_before_any_run(kind: Refused) -> None:
    model = model_zoo.build(kind.model)
    model.forward = None  # a run would fail otherwise
    with pytest.raises(NotImplementedError, match=r"^tiny-random/.* is not supported: .*\.$"):
        EdgeGraph.from_model(model)


@pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no such classes")
@pytest.mark.parametrize(
    "cls, why", [("HookedEncoder", "a norm after every sum"), ("HookedEncoderDecoder", "decoder")]
)
def test_other_classes_of_transformer_lens_are_refused(cls: str, why: str) -> None:
    import transformer_lens

    sizes = {"d_model": 8, "d_head": 4, "n_layers": 1, "n_ctx": 6, "d_vocab": 10, "d_mlp": 8}
    config = transformer_lens.HookedTransformerConfig(**sizes, n_heads=2, act_fn="gelu")
    if cls == "HookedEncoderDecoder":
        config.tie_word_embeddings, config.relative_attention_num_buckets = False, 8
        config.relative_attention_max_distance, config.decoder_start_token_id = 8, 0
        config.use_attention_mask = True
    model = getattr(transformer_lens, cls)(config)
    with pytest.raises(NotImplementedError, match=rf"{cls} is not supported: .*{why}"):
        EdgeGraph.from_model(model)


def test_images_are_refused_under_a_mask() -> None:
    model = model_zoo.load("bridge-gpt2")
    mask = torch.ones(EdgeGraph.from_model(model).n_edges)
    with masked(model, mask, ablation="zero"):
        with pytest.raises(ValueError, match="pixel_values is not supported inside masked"):
            model(model_zoo.tokens(model), pixel_values=torch.zeros(2, 3, 8, 8))


# ------------------------------------------------------------------- what single families need


@pytest.mark.skipif(not HAS_HOOKED, reason="of HookedTransformers")
def test_shortformer_positions_are_no_source() -> None:
    model = model_zoo.load("hooked-shortformer")
    assert EdgeGraph.from_model(model).sources[0] == "input"
    with pytest.raises(ValueError, match="needs learned position embeddings"):
        EdgeGraph.from_model(model, split_embeddings=True)


def in_place_of(name: str) -> tuple[Any, Any]:
    """A model, and the same with its weights processed as TransformerLens does by default."""
    plain, processed = model_zoo.build(name), model_zoo.build(name)
    if bf.is_bridge(processed):
        processed.enable_compatibility_mode(disable_warnings=True)
    else:
        processed.process_weights_()
    return plain, processed


@pytest.mark.parametrize(
    "name", [n for n in ("bridge-gpt2", "hooked-gpt2-ln", "hooked-solu") if n in model_zoo.BUILDERS]
)
def test_weight_processing_matters_under_zero_ablation_alone(name: str) -> None:
    models = in_place_of(name)
    graph = EdgeGraph.from_model(models[0])
    mask = torch.rand(graph.n_edges, generator=torch.Generator().manual_seed(0))
    clean, corrupted = model_zoo.tokens(models[0]), model_zoo.tokens(models[0], seed=1)
    prompts = [model_zoo.tokens(models[0], 1, 6, seed)[0] for seed in range(4)]

    def differ_by(**ablation: Any) -> float:
        """The unembedding may be centred, so of log-probabilities."""
        with torch.no_grad():
            for_each = []
            for model in models:
                with masked(model, mask, **ablation):
                    for_each.append(model(clean).log_softmax(-1))
        return float((for_each[0] - for_each[1]).abs().max())

    assert differ_by(corrupted=corrupted) < 1e-4
    assert differ_by(ablation="mean", prompts=prompts) < 1e-4
    assert differ_by(ablation="zero") > 0.1


# -------------------------------------------------------------------------------- masks in between


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_a_random_mask_and_its_gradient_are_brute_force(name: str) -> None:
    """Also where blocks are recomputed in backward."""
    of = Statements(name)
    dtype = of.logits.dtype
    start = torch.rand(of.graph.n_edges, generator=torch.Generator().manual_seed(0), dtype=dtype)
    weights = torch.linspace(-1, 1, of.logits.numel(), dtype=dtype).view(of.logits.shape)

    def with_gradient(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        mask = start.clone().requires_grad_()
        logits = run(mask)
        return logits.detach(), torch.autograd.grad((logits * weights).sum(), mask)[0]

    def by_brute_force(mask: Tensor) -> Tensor:
        by_name = dict(zip(of.graph.edges, mask.unbind(), strict=True))
        return bf.masked_logits(of.model, of.clean, by_name, of.theirs)

    expected, slope = with_gradient(by_brute_force)
    ours = []
    for kind in (MaskedModel, RecomputedModel):
        if kind is RecomputedModel and name in SCALED_LOGITS:
            with pytest.raises(NotImplementedError, match="Leave recompute out for it"):
                with kind.attach(of.model):
                    pytest.fail("not refused")
            continue
        with kind.attach(of.model) as run:
            reference = run.reference("counterfactual", corrupted=of.corrupted)
            ours.append(with_gradient(partial(run, of.clean, reference=reference)))
    for logits, gradient in ours:
        torch.testing.assert_close(logits, expected, atol=of.tolerance, rtol=of.tolerance)
        tolerance = 10 * of.tolerance * max(1.0, float(slope.abs().max()))
        torch.testing.assert_close(gradient, slope, atol=tolerance, rtol=0)
