"""Checks on a few tokens that a model splits into the graph's sources, once per model and dtype.

`once_per_model` remembers what a check has found. The checks of this file: the logits under the
full mask and without the edges into heads and MLPs (`check_once`), and MLPs without their hidden
neurons (`check_neurons_once`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from tl_edgeprune.ablation.reference import Reference
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.edge_indices import edge_ends

Result = TypeVar("Result")


@runtime_checkable
class MaskedRun(Protocol):
    """What the checks need of a masked model."""

    model: Any
    model_forward: Any
    graph: EdgeGraph
    neuron_shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """Where the model's first layer is, and so its tokens go."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights."""

    def __call__(
        self,
        tokens: Tensor,
        mask: Tensor,
        reference: Reference,
        *,
        spans: Tensor | None = None,
        neurons: Tensor | None = None,
    ) -> Tensor:
        """Logits under a mask."""

    def record(
        self, tokens: Tensor, read_positions: Tensor | None = None
    ) -> tuple[Reference, Tensor]:
        """The unmasked model's activations and logits."""

    def active_dropout(self) -> list[str]:
        """Types of the modules that would drop activations."""


_results: weakref.WeakKeyDictionary[Any, dict[tuple[str, torch.dtype], Any]] = (
    weakref.WeakKeyDictionary()
)


def once_per_model(run: MaskedRun, name: str, check: Callable[[], Result]) -> Result:
    """The result of `check`, run only the first time for this name, model and dtype.

    The result must not hold the model. Nothing is remembered if the check raises: it runs again
    the next time.
    """
    results = _results.setdefault(run.model, {})
    key = name, run.dtype
    if key not in results:
        results[key] = check()
    return results[key]


def check_once(run: MaskedRun) -> None:
    """Raise NotImplementedError if the model's logits are not what the masks predict, and
    ValueError if they are NaN. Skipped while dropout is active.

    With every edge kept the logits must be the model's own. If only the edges from heads and MLPs
    to the logits are kept, every head and MLP must read the reference run, and so give its logits.
    """
    if not run.active_dropout():
        once_per_model(run, "edges", lambda: _check_edges(run))


@torch.no_grad()
def _check_edges(run: MaskedRun) -> None:
    name, tokens = model_name(run), probe_tokens(run)
    plain = run.model_forward(tokens)
    plain = getattr(plain, "logits", plain)
    if not bool(torch.isfinite(plain).all()):
        raise ValueError(
            f"{name} gives NaN or infinite logits on any tokens: check its weights and dtype "
            "before looking for a circuit in it."
        )
    reference, reference_logits = run.record(tokens.flip(0))
    kept = torch.ones(run.graph.n_edges, device=tokens.device)
    only_to_logits = torch.zeros_like(kept)
    to_logits = only_to_logits[run.graph.reads[-1].edges].view(run.graph.n_spans, -1)
    to_logits[:, run.graph.n_inputs :] = 1.0
    spans = torch.zeros_like(tokens)
    error = relative(run(tokens, kept, reference, spans=spans), plain)
    cut_error = relative(run(tokens, only_to_logits, reference, spans=spans), reference_logits)
    if not error <= tolerance(run.dtype):
        raise NotImplementedError(
            f"{name}: its residual stream is not the sum of its input, heads and MLPs (with every "
            f"edge kept the logits are off by {error:.2g} of their size). Such a model would "
            "be scored wrongly, so it is refused."
        )
    if not cut_error <= tolerance(run.dtype):
        raise NotImplementedError(
            f"{name}: its heads or MLPs do not read what their edges carry (with every edge into "
            f"them cut the logits are off by {cut_error:.2g} of their size). Such a model would be "
            "scored wrongly, so it is refused."
        )


def hidden_shape(run: MaskedRun) -> tuple[int, int]:
    """The number of MLPs, and of hidden neurons in each."""
    tokens = probe_tokens(run)
    reference, _ = run.record(tokens, tokens.new_empty((len(tokens), 0)))
    assert reference.hidden is not None
    return len(reference.hidden), reference.hidden.shape[-1]


def check_neurons_once(run: MaskedRun) -> None:
    """Raise NotImplementedError unless removing all hidden neurons of the MLPs gives the same
    logits as removing all edges from the MLPs. Skipped while dropout is active.
    """
    if not run.active_dropout():
        once_per_model(run, "neurons", lambda: _check_neurons(run))


@torch.no_grad()
def _check_neurons(run: MaskedRun) -> None:
    tokens = probe_tokens(run)
    reference, _ = run.record(tokens.flip(0))
    kept = torch.ones(run.graph.n_edges, device=tokens.device)
    mlps = [run.graph.mlp_source(layer) for layer in range(run.graph.n_layers)]
    from_mlps = torch.isin(edge_ends(run.graph)[0], torch.tensor(mlps)).to(tokens.device)
    gates, spans = kept.new_zeros(run.neuron_shape), torch.zeros_like(tokens)
    without_edges = run(tokens, kept.masked_fill(from_mlps, 0.0), reference, spans=spans)
    without_neurons = run(tokens, kept, reference, spans=spans, neurons=gates)
    error = relative(without_neurons, without_edges)
    if not error <= tolerance(run.dtype):
        raise NotImplementedError(
            f"{model_name(run)}: its MLPs do more than their output weights' input shows (with "
            f"every hidden neuron removed the logits are off by {error:.2g} of their size), so "
            "neurons='mlp' is not supported. Use neurons='dimensions'."
        )


def model_name(run: MaskedRun) -> str:
    """The model's name in an error."""
    return str(getattr(run.model.cfg, "model_name", "this model"))


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative error allowed between two ways to the same numbers."""
    return 0.25 if dtype in (torch.float16, torch.bfloat16) else 1e-3


def relative(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference, divided by that of what is expected."""
    return float((actual - expected).float().norm() / expected.float().norm().clamp(min=1e-6))


def probe_tokens(run: MaskedRun) -> Tensor:
    """Two prompts of up to 6 tokens, on the model's device."""
    cfg = run.model.cfg
    length = min(6, int(getattr(cfg, "n_ctx", 6) or 6))
    tokens = torch.arange(2 * length, device=run.device) * 7 + 1
    return tokens.view(2, length) % int(cfg.d_vocab)  # [prompt, pos]
