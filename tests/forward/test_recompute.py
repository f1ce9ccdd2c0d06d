"""Blocks recomputed in backward: the same logits and gradients, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import model_zoo
from test_masked import marks, prompts, random_mask
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tl_edgeprune import EdgeGraph, EdgePruner
from tl_edgeprune.forward.buffers import BufferPool
from tl_edgeprune.forward.forward_pass import HeldSources
from tl_edgeprune.forward.half_blocks import Blocks, reporting_broken_halves
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.forward.recompute import RecomputedModel
from tl_edgeprune.utils.profiling import LiveBytes

NAMES = [
    pytest.param(name, id=name, marks=marks(name, torch.float64))
    for name in model_zoo.ARCHITECTURES
]
few = settings(max_examples=settings.default.max_examples // 8)


def gradients(
    kind: type[MaskedModel], model: Any, graph: EdgeGraph, mask: Tensor, ablation: str, **given: Any
) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a number that all of them decide."""
    clean, corrupted = model_zoo.tokens(model), model_zoo.tokens(model, seed=1)
    mask = mask.clone().requires_grad_()
    with kind.attach(model, graph) as run:
        reference = run.reference(ablation, corrupted=corrupted, prompts=prompts(model))
        logits = run(clean, mask, reference, **given)
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
        (grad,) = torch.autograd.grad((logits * weights).sum(), mask)
    return logits.detach(), grad


@pytest.mark.parametrize("name", NAMES)
@few
@given(
    seed=st.integers(0, 2**16),
    ablation=st.sampled_from(["counterfactual", "zero", "zero-with-biases", "mean-positional"]),
    read_positions=st.sampled_from(
        [None, torch.tensor([[6], [6]]), torch.tensor([[2, 5], [3, 3]])]
    ),
)
def test_gradients_are_those_without_recomputation(
    name: str, seed: int, ablation: str, read_positions: Tensor | None
) -> None:
    model = model_zoo.load(name)
    graph = EdgeGraph.from_model(model)
    mask = random_mask(model, graph, seed).float()
    both = [
        gradients(kind, model, graph, mask, ablation, read_positions=read_positions)
        for kind in (MaskedModel, RecomputedModel)
    ]
    for theirs, mine in zip(*both, strict=True):
        assert_close(mine, theirs)


def assert_close(mine: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    """Up to float32's roundings, in units of the tensor's size."""
    assert float((mine - theirs).norm() / theirs.norm()) < tolerance


FINE = [
    name
    for name in ("bridge-gpt2", "native-ln", "hooked-pythia")
    if name in model_zoo.ARCHITECTURES
]


@pytest.mark.parametrize("name", FINE)
def test_in_float64_gradients_agree_to_its_roundings(name: str) -> None:
    model = model_zoo.load(name, torch.float64)
    graph = EdgeGraph.from_model(model)
    mask = random_mask(model, graph, 3)
    both = [
        gradients(kind, model, graph, mask, "counterfactual")
        for kind in (MaskedModel, RecomputedModel)
    ]
    for theirs, mine in zip(*both, strict=True):
        assert_close(mine, theirs, 1e-12)


def test_the_same_bits_at_every_run() -> None:
    model = model_zoo.load("bridge-llama-gqa")
    graph = EdgeGraph.from_model(model)
    mask = random_mask(model, graph, 5).float()
    first, second = (gradients(RecomputedModel, model, graph, mask, "zero") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [{"split_qkv": False}, {"split_embeddings": True}], ids=str)
def test_other_graphs_of_the_same_model(options: dict[str, bool]) -> None:
    model = model_zoo.load("bridge-gpt2")
    graph = EdgeGraph.from_model(model, **options)
    mask = random_mask(model, graph, 7).float()
    both = [gradients(kind, model, graph, mask, "zero") for kind in (MaskedModel, RecomputedModel)]
    for theirs, mine in zip(*both, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("together", [1, 2, 3, 100])
def test_any_number_of_reads_may_share_a_pass(together: int) -> None:
    model = model_zoo.load("bridge-pythia")
    graph = EdgeGraph.from_model(model)
    mask = random_mask(model, graph, 2).float()
    _, theirs = gradients(MaskedModel, model, graph, mask, "counterfactual")
    with RecomputedModel.attach(model, graph) as run:
        run.together = together
        mask.requires_grad_()
        reference = run.reference("counterfactual", corrupted=model_zoo.tokens(model, seed=1))
        logits = run(model_zoo.tokens(model), mask, reference)
        weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
        (logits * weights).sum().backward()
    assert mask.grad is not None
    assert_close(mask.grad, theirs)


@pytest.mark.parametrize(
    "held", [HeldSources(range(0, 1), 0.5), HeldSources(range(6, 10)), HeldSources(range(10, 11))]
)
def test_held_sources_pass_no_gradient_on(held: HeldSources) -> None:
    model = model_zoo.load("bridge-gpt2")  # five sources a layer: an input, four heads, an MLP
    graph = EdgeGraph.from_model(model)
    mask = random_mask(model, graph, 4).float()
    contract = torch.randn(graph.n_sources, 14, model.cfg.d_model)
    both = [
        gradients(kind, model, graph, mask, "counterfactual", held=held, contract=contract)
        for kind in (MaskedModel, RecomputedModel)
    ]
    for theirs, mine in zip(*both, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["bridge-gpt2", "bridge-gemma2", "bridge-pythia"])
def test_the_references_gradients_too(name: str) -> None:
    model = model_zoo.load(name)
    graph = EdgeGraph.from_model(model)
    mask = random_mask(model, graph, 6).float()
    found = []
    for kind in (MaskedModel, RecomputedModel):
        with kind.attach(model, graph) as run:
            reference = run.reference("counterfactual", corrupted=model_zoo.tokens(model, seed=1))
            leaves = [tensor.requires_grad_() for tensor in reference._tensors()]
            logits = run(
                model_zoo.tokens(model), mask, reference._with(leaves), torch.tensor([[6], [3]])
            )
            found.append(torch.autograd.grad(logits.logsumexp(-1).sum(), leaves))
    for theirs, mine in zip(*found, strict=True):
        assert_close(mine, theirs)


# ------------------------------------------------------------------------------------------ memory


def deep(n_layers: int) -> Any:
    """A GPT-2 of many thin layers."""
    config = transformers.GPT2Config(
        n_layer=n_layers, n_embd=32, n_head=2, n_positions=32, vocab_size=40
    )
    config._attn_implementation = "eager"
    config.architectures = ["GPT2LMHeadModel"]
    with torch.random.fork_rng(devices=[]):
        module = transformers.GPT2LMHeadModel(config).eval()
    return build_bridge_from_module(
        module, "GPT2LMHeadModel", hf_config=config, model_name=f"deep-{n_layers}"
    )


def peak_beside_buffers(kind: type[MaskedModel], n_layers: int) -> float:
    """The peak of a forward and backward, less its two buffers, in residual streams."""
    model = deep(n_layers)
    graph = EdgeGraph.from_model(model)
    clean, corrupted = model_zoo.tokens(model, 8, 32), model_zoo.tokens(model, 8, 32, seed=1)
    mask = torch.full((graph.n_edges,), 0.5, requires_grad=True)
    stream = 8 * 32 * 32 * 4
    with kind.attach(model, graph) as run:
        if isinstance(run, RecomputedModel):
            run.together = 2  # one block at a time, whatever the depth
            run.halves.record(clean)
        reference = run.reference("counterfactual", corrupted=corrupted)
        run.pool = BufferPool()
        with LiveBytes() as live:
            run(clean, mask, reference, torch.full((8, 1), 31)).sum().backward()
    return live.peak / stream - 2 * graph.n_sources


def test_memory_beside_the_buffers_does_not_grow_with_depth() -> None:
    shallow, deeper = (peak_beside_buffers(RecomputedModel, n) for n in (3, 8))
    assert deeper < 1.15 * shallow  # the mask's own blocks grow
    plain = peak_beside_buffers(MaskedModel, 8)
    assert plain > 4 * deeper


# ------------------------------------------------------------------------------------------- state


def test_a_second_backward_raises_and_a_new_forward_works() -> None:
    model = model_zoo.load("bridge-gpt2")
    with RecomputedModel.attach(model) as run:
        mask = torch.ones(run.graph.n_edges, requires_grad=True)
        reference = run.reference("zero")
        first, second = (run(model_zoo.tokens(model, seed=s), mask, reference) for s in (0, 1))
        first.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="backpropagated before"):
            first.sum().backward()
        second.sum().backward()
        with torch.no_grad():
            mask += 0.5
        third = run(model_zoo.tokens(model), mask, reference).sum()
        with torch.no_grad():
            mask += 0.5
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            third.backward()


def test_blocks_that_cannot_be_run_by_halves_are_refused_by_name(monkeypatch: Any) -> None:
    model = model_zoo.build("bridge-gpt2")
    exact = Blocks.mlp
    monkeypatch.setattr(Blocks, "mlp", lambda self, layer, x: 1.1 * exact(self, layer, x))
    with pytest.raises(NotImplementedError, match=r"tiny-random/gpt2: .*off by .* Leave recompute"):
        with RecomputedModel.attach(model):
            pass
    monkeypatch.setattr(Blocks, "mlp", lambda self, layer, x: None)
    with pytest.raises(NotImplementedError, match="cannot be run by halves"):
        with RecomputedModel.attach(model):
            pass
    with MaskedModel.attach(model):  # left as it was
        pass


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_running_out_of_memory_is_no_refusal(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, reporting_broken_halves():
        raise error
    assert raised.value is error


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_pruning_run_is_the_same_run(dtype: torch.dtype | None) -> None:
    model = model_zoo.load("bridge-llama-gqa")
    common = {"batch_size": 5, "accumulate": 2, "dtype": dtype, "progress": False}

    def learned(recompute: bool, **settings: Any) -> torch.Tensor:
        pruner = EdgePruner(20, recompute=recompute, **common, **settings)
        return pruner.fit(model, model_zoo.pairs(model)).log_alpha

    theirs, mine = (learned(on, steps=3) for on in (False, True))
    assert mine.dtype == torch.float32  # gates, whatever the weights
    if dtype is None:
        # Adam's first steps are as large for a tiny gradient as for any: signs may differ there.
        assert float(((mine - theirs).abs() < 1e-3).float().mean()) > 0.98
        return
    starts = [learned(on, steps=1, lr=1e-9) for on in (False, True)]
    moves = torch.stack([theirs, mine]) - torch.stack(starts)
    assert float(torch.corrcoef(moves)[0, 1]) > 0.9
