"""Gates on neurons: held to brute force, which changes each source's output by hand."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import brute_force as bf
import pytest
import torch
import zoo
from torch import Tensor

from tl_edgeprune import EdgeGraph, masked

KINDS = ("mlp", "dimensions")
QUICK = {"bridge-gpt2", "bridge-llama-gqa", "bridge-pythia", "native-no-norm", "hooked-llama-gqa"}
POST_NORM = ("gemma2", "gemma3", "olmo2")
NO_HIDDEN = ("mixtral", "attn-only")
MODELS = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name in zoo.ARCHITECTURES
]


def places(graph: EdgeGraph, kind: str) -> list[str]:
    return [s for s in graph.sources if kind == "dimensions" or s.startswith("m")]


def widths(model: Any, kind: str) -> int:
    return model.cfg.d_model if kind == "dimensions" else model.blocks[0].mlp.W_out.shape[0]


def hidden_of(model: Any, tokens: Tensor, seen: dict[str, Tensor]) -> Tensor:
    """The model's own logits, and every MLP's hidden activations into `seen`."""
    return with_hidden(model, seen, lambda: model(tokens))


def with_hidden(model: Any, seen: dict[str, Tensor], run: Any) -> Tensor:
    with ExitStack() as undo:
        for layer in range(model.cfg.n_layers):
            point = model.hook_dict[f"blocks.{layer}.mlp.hook_post"]
            point.add_hook(lambda h, hook, layer=layer: seen.__setitem__(f"m{layer}", h))
            undo.callback(point.remove_hooks)
        return run()


def naive(model: Any, clean: Tensor, corrupted: Tensor, mask: Tensor, gates: Tensor) -> Tensor:
    """Each source's output changed by hand: an MLP's by what its removed neurons' output weights
    make of their differences, h W_out being a sum over neurons.
    """
    graph = EdgeGraph.from_model(model)
    kind = "mlp" if len(gates) == graph.n_layers else "dimensions"
    row_of = {name: row for row, name in enumerate(places(graph, kind))}
    h, h_ref = {}, {}
    if kind == "mlp":
        hidden_of(model, corrupted, h_ref)
    replacement = bf.source_outputs(model, corrupted)

    def gated(name: str, y: Tensor) -> Tensor:
        if kind == "dimensions":
            return replacement[name] + gates[row_of[name]] * (y - replacement[name])
        if name not in row_of:
            return y
        weight = model.blocks[row_of[name]].mlp.W_out.detach()
        removed = (1 - gates[row_of[name]]) * (h[name] - h_ref[name])
        return y - removed @ weight

    edges = dict(zip(graph.edges, mask.unbind(), strict=True))

    def run() -> Tensor:
        return bf.masked_logits(model, clean, edges, replacement, gated=gated)

    return with_hidden(model, h, run) if kind == "mlp" else run()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_gates_are_their_definition(name: str, kind: str) -> None:
    """Logits, and the gradients of edges' masks and of gates."""
    if kind == "mlp" and name.endswith(NO_HIDDEN + POST_NORM):
        pytest.skip("has no hidden neurons, or a norm after W_out")
    dtype = zoo.dtypes(name)[-1]
    model, tolerance = zoo.load(name, dtype), zoo.tolerance(name, dtype)
    graph = EdgeGraph.from_model(model)
    clean, corrupted = zoo.tokens(model), zoo.tokens(model, seed=1)
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = uniform(graph.n_edges).requires_grad_()
    gates = uniform(len(places(graph, kind)), widths(model, kind)).requires_grad_()
    weights = torch.randn(*clean.shape, zoo.VOCAB, generator=generator, dtype=dtype)
    with masked(model, mask, corrupted=corrupted, neurons=gates):
        logits = model(clean)
    expected = naive(model, clean, corrupted, mask, gates)
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
    found, wanted = (
        torch.autograd.grad((x * weights).sum(), (mask, gates)) for x in (logits, expected)
    )
    for actual, slope in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            actual, slope, atol=10 * tolerance * float(slope.abs().max()), rtol=0
        )
