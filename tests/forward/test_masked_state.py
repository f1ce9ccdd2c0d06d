"""What a masked context keeps apart: one forward from the next, and the user's model from all
this.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import model_zoo
from torch import Tensor, nn

from tl_edgeprune import EdgeGraph, masked
from tl_edgeprune.forward import forward_pass as forward
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.forward.residual import Stream
from tl_edgeprune.hooks.find import find_sites

# One of each way in: both classes, GQA, a parallel block with one norm, a post-norm, no MLP.
NAMES = [
    name
    for name in (
        *("bridge-gpt2", "bridge-llama-gqa", "bridge-gptj", "bridge-gemma2", "native-attn-only"),
        *("hooked-gpt2-ln", "hooked-llama-gqa", "hooked-attn-only"),
    )
    if name in model_zoo.ARCHITECTURES
]
# A point inside a block where a hook acts; in some classes a hook on the pattern only looks on.
ACTING = {
    "bridge-gptj": "blocks.1.mlp.hook_pre",
    "bridge-gemma2": "blocks.1.mlp.hook_pre",
    "native-attn-only": "ln_final.hook_normalized",
}
PATTERN = "blocks.1.attn.hook_pattern"
each_model = pytest.mark.parametrize("name", NAMES)
FLAGS = ("use_split_qkv_input", "use_attn_result", "use_hook_mlp_in")


def random_mask(model: Any, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(EdgeGraph.from_model(model).n_edges, generator=generator)


def gradient(model: Any, mask: Tensor, tokens: Tensor, **options: Any) -> Tensor:
    """Of the mask, in a context of its own."""
    mask = mask.clone().requires_grad_()
    with masked(model, mask, **options):
        return torch.autograd.grad(loss_of(model(tokens)), mask)[0]


def loss_of(logits: Tensor) -> Tensor:
    return logits.square().sum()


# ------------------------------------------------------------------------------ many forwards in
# one


@each_model
def test_two_forwards_then_both_backwards(name: str) -> None:
    model = model_zoo.load(name)
    first, second, corrupted = (model_zoo.tokens(model, seed=seed) for seed in range(3))
    mask = random_mask(model)
    expected = [gradient(model, mask, tokens, corrupted=corrupted) for tokens in (first, second)]
    mask.requires_grad_()
    with masked(model, mask, corrupted=corrupted):
        for order in ((0, 1), (1, 0)):
            losses = [loss_of(model(tokens)) for tokens in (first, second)]
            for place in order:
                actual = torch.autograd.grad(losses[place], mask)[0]
                assert torch.equal(actual, expected[place])
        (loss_of(model(first)) + loss_of(model(second))).backward()
    assert mask.grad is not None
    torch.testing.assert_close(mask.grad, expected[0] + expected[1])


@each_model
def test_a_backward_after_the_context(name: str) -> None:
    model = model_zoo.load(name)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    mask = random_mask(model).requires_grad_()
    with masked(model, mask, corrupted=corrupted):
        loss = loss_of(model(clean))
    expected = gradient(model, mask.detach(), clean, corrupted=corrupted)
    assert torch.equal(torch.autograd.grad(loss, mask)[0], expected)


@each_model
def test_a_forward_sees_the_mask_as_it_is_now(name: str) -> None:
    model = model_zoo.load(name)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    mask, seen = random_mask(model).requires_grad_(), []
    with masked(model, mask, corrupted=corrupted):
        for seed in range(3):
            with torch.no_grad():
                mask.copy_(random_mask(model, seed))
            seen.append(torch.autograd.grad(loss_of(model(clean)), mask)[0])
    for seed, actual in enumerate(seen):
        fresh = gradient(model, random_mask(model, seed), clean, corrupted=corrupted)
        assert torch.equal(actual, fresh)


@each_model
def test_a_mask_changed_between_forward_and_backward_raises(name: str) -> None:
    model = model_zoo.load(name)
    mask = random_mask(model).requires_grad_()
    with masked(model, mask, corrupted=model_zoo.tokens(model, seed=1)):
        loss = loss_of(model(model_zoo.tokens(model)))
        with torch.no_grad():
            mask.mul_(0.5)
        with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
            loss.backward()


@each_model
def test_a_second_backward_raises(name: str) -> None:
    model = model_zoo.load(name)
    mask = random_mask(model).requires_grad_()
    with masked(model, mask, corrupted=model_zoo.tokens(model, seed=1)):
        loss = loss_of(model(model_zoo.tokens(model)))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="Run the forward again for each backward"):
            loss.backward()


@each_model
def test_a_double_backward_raises(name: str) -> None:
    model = model_zoo.load(name)
    mask = random_mask(model).requires_grad_()
    with masked(model, mask, corrupted=model_zoo.tokens(model, seed=1)):
        loss = loss_of(model(model_zoo.tokens(model)))
        first = torch.autograd.grad(loss, mask, create_graph=True)[0]
        with pytest.raises(RuntimeError):
            first.square().sum().backward()


class Stop(Exception):
    """Raised in the middle of a forward."""


@contextmanager
def stopping(model: Any, point: str, error: type[BaseException]) -> Iterator[None]:
    def stop(tensor: Tensor, hook: Any) -> None:
        raise error

    model.hook_dict[point].add_hook(stop)
    try:
        yield
    finally:
        model.hook_dict[point].remove_hooks()


@each_model
def test_a_forward_after_one_that_broke_off(name: str) -> None:
    model = model_zoo.load(name)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    mask = random_mask(model).requires_grad_()
    with masked(model, mask, corrupted=corrupted):
        with stopping(model, PATTERN, Stop), pytest.raises(Stop):
            model(clean)
        actual = torch.autograd.grad(loss_of(model(clean)), mask)[0]
    assert torch.equal(actual, gradient(model, mask.detach(), clean, corrupted=corrupted))


@each_model
def test_forwards_of_many_kinds_in_one_context(name: str) -> None:
    """Used buffers, other shapes in between, with and without gradients: the same bits as fresh."""
    model = model_zoo.load(name)
    mask = random_mask(model)
    shapes = [(2, 7), (1, 5), (3, 7), (2, 7)]
    runs = [model_zoo.tokens(model, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    expected = [gradient(model, mask, tokens, ablation="zero") for tokens in runs]
    mask.requires_grad_()
    with masked(model, mask, ablation="zero"):
        for _ in range(2):
            for tokens, fresh in zip(runs, expected, strict=True):
                with torch.inference_mode():
                    plain = model(tokens)
                with torch.no_grad():
                    assert torch.equal(model(tokens), plain)
                logits = model(tokens)
                assert torch.equal(logits, plain)
                assert torch.equal(torch.autograd.grad(loss_of(logits), mask)[0], fresh)
                del logits


@each_model
def test_the_same_call_gives_the_same_bits(name: str) -> None:
    model = model_zoo.load(name)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    mask = random_mask(model)
    first, second = (gradient(model, mask, clean, corrupted=corrupted) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("ends", ["backward", "no backward", "exception"])
def test_a_forward_is_freed(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffers and graph go with the last reference to its logits, without the collector."""
    streams: list[weakref.ref[Stream]] = []

    class Watched(Stream):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            streams.append(weakref.ref(self))

    model = model_zoo.load(
        "bridge-llama"
    )  # TransformerLens' own GPT-2 holds on to its last forward
    mask = random_mask(model).requires_grad_()
    with masked(model, mask, ablation="zero"):
        monkeypatch.setattr(forward, "Stream", Watched)
        gc.disable()
        try:
            if ends == "exception":
                with stopping(model, PATTERN, Stop):
                    with contextlib.suppress(Stop):
                        model(model_zoo.tokens(model))
            else:
                loss = loss_of(model(model_zoo.tokens(model)))
                if ends == "backward":
                    loss.backward()
                del loss
            assert len(streams) == 1 and streams[0]() is None
        finally:
            gc.enable()


# ------------------------------------------------------------------------------- the user's model


def state(model: Any) -> dict[str, Any]:
    """All that a context could leave changed."""
    points = model.hook_dict
    return {
        "hooks": {
            name: [(id(h), h.is_permanent) for h in point.fwd_hooks + point.bwd_hooks]
            for name, point in points.items()
        },
        "torch hooks": {
            name: [
                id(function)
                for function in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
                if not function.__module__.startswith("transformer_lens")  # wired at first use
            ]
            for name, m in model.named_modules()
        },
        "flags": {flag: getattr(model.cfg, flag, None) for flag in (*FLAGS, "use_attn_in")},
        "blocks' flags": [
            {flag: getattr(getattr(m, holder, None), flag, None) for flag in FLAGS}
            for m in model.modules()
            for holder in ("cfg", "config")
        ],
        "requires_grad": [p.requires_grad for p in parameters(model)],
        "grad": [None if p.grad is None else p.grad.clone() for p in parameters(model)],
        "weights": [p.detach().clone() for p in parameters(model)],
        "training": [module.training for module in modules(model)],
        "attributes": {name: id(value) for name, value in vars(model).items()},
    }


def parameters(model: Any) -> list[nn.Parameter]:
    return [p for m in modules(model) for p in m._parameters.values() if p is not None]


def modules(model: Any) -> list[nn.Module]:
    """With those that the Bridge's own tree leaves out."""
    return [*model.modules(), *getattr(model, "original_model", nn.Identity()).modules()]


def same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return torch.equal(before, after)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(before[k], after[k]) for k in before)
    if isinstance(before, list):
        return len(before) == len(after) and all(map(same, before, after))
    return bool(before == after)


def used_model(name: str) -> Any:
    """A model as a user may bring it: hooks, flags, frozen and unfrozen weights, gradients."""
    model = model_zoo.build(name)
    points = model.hook_dict

    def untouched(tensor: Tensor, hook: Any) -> None: ...

    points["blocks.0.attn.hook_pattern"].add_hook(untouched)
    points["blocks.1.attn.hook_attn_scores"].add_hook(untouched, is_permanent=True)
    for flag in FLAGS[:2] if model.cfg.attn_only else FLAGS:
        try:
            getattr(model, f"set_{flag}")(True)
        except NotImplementedError:  # the Bridge's refusal to split
            getattr(model, f"set_{flag}")(False)
    some = parameters(model)
    for parameter in some[::2]:
        parameter.requires_grad_(False)
    for parameter in some[1::2]:
        parameter.grad = torch.randn_like(parameter)
    # Whether it trains differs between modules; none of them drops anything.
    for module in modules(model):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    next(iter(model.blocks)).train()
    return model


def run(model: Any, tokens: Tensor) -> None:
    loss_of(model(tokens)).backward()


def interrupted(error: type[BaseException]) -> Callable[[Any, Tensor], None]:
    def run(model: Any, tokens: Tensor) -> None:
        with stopping(model, "ln_final.hook_normalized", error):
            model(tokens)

    return run


def raising(model: Any, tokens: Tensor) -> None:
    model(tokens)
    raise Stop


def wrong_call(model: Any, tokens: Tensor) -> None:
    model(tokens[:, :3])


WAYS_OUT = {
    "at its end": (run, None),
    "by an exception": (raising, Stop),
    "by an exception inside the model": (interrupted(Stop), Stop),
    "by an interrupt": (interrupted(KeyboardInterrupt), KeyboardInterrupt),
    "by a refused call": (wrong_call, ValueError),
}


@pytest.mark.parametrize("way", WAYS_OUT)
@each_model
def test_the_model_is_left_as_it_was(name: str, way: str) -> None:
    model = used_model(name)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    mask = random_mask(model).requires_grad_()
    before = state(model)
    body, error = WAYS_OUT[way]

    def use() -> None:
        with masked(model, mask, corrupted=corrupted) as same_model:
            assert same_model is model
            assert not any(p.requires_grad for p in parameters(model))
            body(model, clean)

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    after = state(model)
    for part in before:
        assert same(before[part], after[part]), part


@each_model
def test_a_forward_and_generate_of_the_users_own_come_back(name: str) -> None:
    model = model_zoo.build(name)
    forward, calls = model.forward, []

    def own_forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return forward(*args, **kwargs)

    model.__dict__["forward"] = own_forward
    model.__dict__["generate"] = own_generate = object()
    with masked(model, random_mask(model), ablation="zero"):
        calls.clear()
        model(model_zoo.tokens(model))
        assert len(calls) == 1
    assert model.forward is own_forward
    assert model.__dict__["generate"] is own_generate


@each_model
@torch.no_grad()
def test_the_users_hooks_elsewhere_act_inside(name: str) -> None:
    """In the masked and in the reference run, permanent or not."""
    model = model_zoo.build(name)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    point = model.hook_dict[ACTING.get(name, PATTERN)]
    graph = EdgeGraph.from_model(model)
    results = {}
    for is_permanent in (False, True):
        point.add_hook(lambda x, hook: x * 0.5, is_permanent=is_permanent)
        for label, mask in (("full", torch.ones), ("empty", torch.zeros)):
            with masked(model, mask(graph.n_edges), corrupted=corrupted):
                results[label] = model(clean)
        torch.testing.assert_close(results["full"], model(clean), atol=1e-4, rtol=0)
        torch.testing.assert_close(results["empty"], model(corrupted), atol=1e-4, rtol=0)
        point.remove_hooks(including_permanent=True)
        assert not torch.allclose(results["full"], model(clean), atol=1e-3)


@each_model
@torch.no_grad()
def test_run_with_hooks_and_run_with_cache_are_masked(name: str) -> None:
    model = model_zoo.load(name)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    point = ACTING.get(name, PATTERN)
    with masked(model, random_mask(model), corrupted=corrupted):
        expected = model(clean)
        for _ in range(2):
            logits, cache = model.run_with_cache(clean)
            assert torch.equal(logits, expected)
            halved = model.run_with_hooks(clean, fwd_hooks=[(point, lambda x, hook: x * 0.5)])
            assert not torch.allclose(halved, expected)
            assert torch.equal(model(clean), expected)
    _, plain = model.run_with_cache(clean)
    assert not torch.allclose(cache[PATTERN], plain[PATTERN]), "the cache is the masked run's"


@each_model
@torch.no_grad()
def test_a_cache_with_every_edge_kept_is_the_models_own(name: str) -> None:
    """At every point: what the package's own runs leave out is computed where a user looks on."""
    model = model_zoo.load(name)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    _, plain = model.run_with_cache(clean)
    with masked(model, torch.ones(EdgeGraph.from_model(model).n_edges), corrupted=corrupted):
        _, cache = model.run_with_cache(clean)
    assert set(plain) <= set(cache)
    for point, expected in plain.items():
        assert_close = torch.testing.assert_close
        assert_close(cache[point], expected, atol=1e-4, rtol=1e-4, msg=lambda m, p=point: p + m)


@each_model
@torch.no_grad()
def test_a_masked_cache_holds_the_models_own_stream(name: str) -> None:
    """What the masked heads and MLPs gave, summed; but for the last point, which the logits
    read.
    """
    model = model_zoo.load(name, torch.float64)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    mask = random_mask(model)
    with masked(model, mask, corrupted=corrupted):
        _, cache = model.run_with_cache(clean)
    stream = cache["blocks.0.hook_resid_pre"]
    for layer, site in enumerate(find_sites(model).attention):
        block = f"blocks.{layer}."
        torch.testing.assert_close(cache[f"{block}hook_resid_pre"], stream, atol=1e-5, rtol=1e-5)
        written = torch.einsum("bphd,hdm->bpm", cache[site.z], site.output)
        if site.output_bias is not None:
            written = written + site.output_bias
        if site.post is not None:
            size = (written.square().mean(-1, keepdim=True) + site.post.eps).sqrt()
            written = written / size * site.post.gain
        actual = cache[f"{block}hook_attn_out"]
        torch.testing.assert_close(actual, written, atol=1e-5, rtol=1e-5)
        mlp = f"{block}hook_mlp_out"
        stream = stream + actual + cache.cache_dict.get(mlp, 0)


@each_model
def test_a_hooks_own_parameters_are_trained_through_the_mask(name: str) -> None:
    """A user's steering vector on an allowed point gets its gradient, with a constant mask."""
    model = model_zoo.load(name, torch.float64)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    steering = torch.tensor([0.1, -0.2], dtype=torch.float64, requires_grad=True)
    point = ACTING.get(name, PATTERN)
    hook = (point, lambda x, hook: x * (1 + steering[0]) + steering[1])

    def trained() -> Tensor:
        loss = loss_of(model.run_with_hooks(clean, fwd_hooks=[hook]))
        return torch.autograd.grad(loss, steering)[0]

    expected = trained()
    ones = torch.ones(EdgeGraph.from_model(model).n_edges)
    with masked(model, ones, corrupted=corrupted):
        torch.testing.assert_close(trained(), expected, rtol=1e-5, atol=1e-5)


def test_the_reference_ignores_the_mask() -> None:
    """Recording inside a running context gives the unmasked model's activations."""
    model = model_zoo.load("bridge-gpt2")
    clean = model_zoo.tokens(model)
    expected = model(clean)
    with MaskedModel.attach(model) as run:
        mask = torch.zeros(run.graph.n_edges)
        run.set(mask=mask, reference=run.reference("zero"))
        assert torch.equal(run.record(clean)[1], expected)
        assert not torch.allclose(run(clean, mask, run.reference("zero")), expected)


@pytest.mark.filterwarnings("ignore:A forward hook edited")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in NAMES else pytest.mark.slow)
        for name in model_zoo.ARCHITECTURES
    ],
)
@torch.no_grad()
def test_a_users_hook_acts_as_outside_or_is_refused(name: str) -> None:
    """At every hook point of the last block and after it, with every edge kept."""
    model = model_zoo.load(name)
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    points = model.hook_dict
    refused = {id(points[name]) for name in find_sites(model).overwritten(model)}
    block = f"blocks.{model.cfg.n_layers - 1}."
    free = {
        id(point): name
        for name, point in points.items()
        if id(point) not in refused and (name.startswith(block) or "blocks" not in name)
    }

    def outputs() -> dict[str, Tensor]:
        results = {}
        for point in free.values():
            with contextlib.suppress(ValueError):  # a point that a flag switches off
                results[point] = model.run_with_hooks(clean, fwd_hooks=[(point, half)])
        return results

    def half(tensor: Tensor, hook: Any) -> Tensor | None:
        return tensor * 0.5 if isinstance(tensor, Tensor) and tensor.is_floating_point() else None

    expected = outputs()
    graph = EdgeGraph.from_model(model)
    with masked(model, torch.ones(graph.n_edges), corrupted=corrupted):
        actual = outputs()
    wrong = [p for p in expected if not torch.allclose(actual[p], expected[p], atol=1e-3)]
    assert not wrong
