"""Whether a model's masked run is what the masks leave of its own, once a model and dtype."""

from __future__ import annotations

import weakref
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tl_edgeprune.ablation.reference import Reference
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.graph.edge_indices import edge_ends
from tl_edgeprune.hooks.sites import Sites


@runtime_checkable
class MaskedRun(Protocol):
    """What the check needs of a masked model."""

    model: Any
    model_forward: Any
    sites: Sites
    graph: EdgeGraph
    neuron_shape: tuple[int, int]

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

    def record(self, tokens: Tensor, positions: Tensor | None = None) -> tuple[Reference, Tensor]:
        """The unmasked model's activations and logits."""

    def active_dropout(self) -> list[str]:
        """Types of the modules that would drop activations."""


_checked: weakref.WeakKeyDictionary[Any, set[torch.dtype]] = weakref.WeakKeyDictionary()


def check_once(run: MaskedRun) -> None:
    """Raise NotImplementedError if the model's own run is not what the masks leave of it, and
    ValueError if it gives NaN.

    With every edge kept the logits must be the model's own. With the edges from heads and MLPs to
    the logits alone, every head and MLP must read the reference run, and so give its logits.
    """
    dtype = run.sites.attention[0].output.dtype
    if dtype in _checked.get(run.model, ()) or run.active_dropout():
        return
    tokens = probe_tokens(run)
    with torch.no_grad():
        plain = run.model_forward(tokens)
        plain = getattr(plain, "logits", plain)
        if not bool(torch.isfinite(plain).all()):
            raise ValueError(
                f"{_name(run)} gives NaN or infinite logits on any tokens: check its weights and "
                "dtype before looking for a circuit in it."
            )
        reference, other = run.record(tokens.flip(0))
        kept = torch.ones(run.graph.n_edges, device=tokens.device)
        cut = torch.zeros_like(kept)
        to_logits = cut[run.graph.reads[-1].edges].view(run.graph.n_spans, -1)
        to_logits[:, run.graph.n_inputs :] = 1.0
        spans = torch.zeros_like(tokens)
        errors = [relative(run(tokens, kept, reference, spans=spans), plain)]
        errors.append(relative(run(tokens, cut, reference, spans=spans), other))
    name = _name(run)
    if not errors[0] <= tolerance(dtype):
        raise NotImplementedError(
            f"{name}: its residual stream is not the sum of its input, heads and MLPs (with every "
            f"edge kept the logits are off by {errors[0]:.2g} of their size). Such a model would "
            "be scored wrongly, so it is refused."
        )
    if not errors[1] <= tolerance(dtype):
        raise NotImplementedError(
            f"{name}: its heads or MLPs do not read what their edges carry (with every edge into "
            f"them cut the logits are off by {errors[1]:.2g} of their size). Such a model would be "
            "scored wrongly, so it is refused."
        )
    _checked.setdefault(run.model, set()).add(dtype)


def hidden_shape(run: MaskedRun) -> tuple[int, int]:
    """MLPs, and the hidden neurons of each."""
    tokens = probe_tokens(run)
    reference, _ = run.record(tokens, tokens.new_empty((len(tokens), 0)))
    assert reference.hidden is not None
    return len(reference.hidden), reference.hidden.shape[-1]


_neurons_checked: weakref.WeakKeyDictionary[Any, set[torch.dtype]] = weakref.WeakKeyDictionary()


def check_neurons_once(run: MaskedRun) -> None:
    """Raise NotImplementedError unless MLPs without their neurons are MLPs without their edges."""
    dtype = run.sites.attention[0].output.dtype
    if dtype in _neurons_checked.get(run.model, ()) or run.active_dropout():
        return
    tokens = probe_tokens(run)
    with torch.no_grad():
        reference, _ = run.record(tokens.flip(0))
        kept = torch.ones(run.graph.n_edges, device=tokens.device)
        mlps = [run.graph.mlp_source(layer) for layer in range(run.graph.n_layers)]
        of_mlps = torch.isin(edge_ends(run.graph)[0], torch.tensor(mlps)).to(tokens.device)
        gates, spans = kept.new_zeros(run.neuron_shape), torch.zeros_like(tokens)
        without_edges = run(tokens, kept.masked_fill(of_mlps, 0.0), reference, spans=spans)
        without_neurons = run(tokens, kept, reference, spans=spans, neurons=gates)
    error = relative(without_neurons, without_edges)
    if not error <= tolerance(dtype):
        name = _name(run)
        raise NotImplementedError(
            f"{name}: its MLPs do more than their output weights' input shows (with every hidden "
            f"neuron removed the logits are off by {error:.2g} of their size), so neurons='mlp' is "
            "not supported. Use neurons='dimensions'."
        )
    _neurons_checked.setdefault(run.model, set()).add(dtype)


def _name(run: MaskedRun) -> str:
    return str(getattr(run.model.cfg, "model_name", "this model"))


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways to the same numbers may be apart, in units of their size."""
    return 0.25 if dtype in (torch.float16, torch.bfloat16) else 1e-3


def relative(actual: Tensor, expected: Tensor) -> float:
    """The size of the difference, in units of what is expected."""
    return float((actual - expected).float().norm() / expected.float().norm().clamp(min=1e-6))


def probe_tokens(run: MaskedRun) -> Tensor:
    cfg = run.model.cfg
    length = min(6, int(getattr(cfg, "n_ctx", 6) or 6))
    device = run.sites.attention[0].output.device
    return (torch.arange(2 * length, device=device) * 7 + 1).view(2, length) % int(cfg.d_vocab)
