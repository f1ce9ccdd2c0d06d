"""`masked`: the model itself, with its edges masked for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int, Shaped
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation
from tl_edgeprune.ablation.kinds import ABLATIONS, check_ablation
from tl_edgeprune.circuits.neurons import Neurons
from tl_edgeprune.forward.call_checks import check_mask
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.modules import model_kind
from tl_edgeprune.hooks.prompt_checks import check_corrupted, check_prompts
from tl_edgeprune.utils.renamed import renamed_argument


@renamed_argument("positions", "read_positions")
@contextmanager
def masked(
    model: Any,
    circuit_or_mask: Any,
    *,
    corrupted: Int[Tensor, "batch pos"] | None = None,
    ablation: Ablation | None = None,
    prompts: Sequence[Tensor] | Int[Tensor, "prompt pos"] | None = None,
    read_positions: Int[Tensor, "batch read"] | None = None,
    spans: Int[Tensor, "batch pos"] | None = None,
    graph: EdgeGraph | None = None,
    neurons: Neurons | Shaped[Tensor, "place unit"] | None = None,
) -> Iterator[Any]:
    """The model itself, with its edges masked for as long as the context lasts.

    Args:
        circuit_or_mask: a Circuit, or a mask [n_edges] of bools or floats (1 keeps an edge, 0
            removes it, other numbers interpolate or extrapolate linearly; may require gradients,
            and may change in place between forwards).
        corrupted: the prompts whose activations replace removed edges, position by position.
        ablation: "counterfactual" (needs `corrupted`; the default with it), "zero",
            "zero-with-biases" (heads' shares of the output biases go with them), "mean" or
            "mean-positional" (means over `prompts`), or Constants that were learned.
        read_positions: the positions to compute logits at, [batch, read]: the model then returns
            [batch, read, d_vocab] instead of [batch, pos, d_vocab].
        spans: the span of each position, as an index into the graph's spans (`batch.spans`), for a
            circuit or mask with spans. Edges by position do not need it.
        graph: the mask's graph, if it is not `EdgeGraph.from_model(model)`.
        neurons: Neurons, or gates with numbers like the mask's: [n_layers, d_mlp] on the MLPs'
            hidden neurons or [n_sources, d_model] on what each source writes.

    Yields the model. Its weights are frozen inside the context; hooks, flags, gradients and mode
    are restored on leaving.

    Raises ValueError for a mask of another length or dtype, for tokens of another shape than
    `corrupted`, outside the vocabulary or past the last position, for KV caches, padding masks,
    active dropout, `generate`, and for hooks of your own that the mask would override;
    NotImplementedError for a model that does not split into the graph's sources.

    Bhaskar et al. 2024, equations 1 to 3; x_i = r_i + sum_j z_ij (y_j - ref_j).
    """
    mask = _mask_of(circuit_or_mask)
    kind = _ablation_kind(ablation, corrupted, prompts)
    model_kind(model)
    if corrupted is not None:
        check_corrupted(model, corrupted)
    check_prompts(model, () if prompts is None else prompts, "prompts")
    with MaskedModel.attach(model, _graph_of(circuit_or_mask, graph), neurons) as run:
        check_mask(mask, run.graph)
        gates = run.gates_of(neurons)
        reference = run.reference(kind, corrupted=corrupted, prompts=prompts)
        run.set(
            mask=mask,
            reference=reference,
            read_positions=read_positions,
            spans=spans,
            neurons=gates,
        )
        with run.shadowed():
            yield model


def _graph_of(circuit_or_mask: Any, graph: EdgeGraph | None) -> EdgeGraph | None:
    circuit_graph = getattr(circuit_or_mask, "graph", graph)
    if graph is not None and circuit_graph != graph:
        raise ValueError(
            f"the circuit has its own graph, {circuit_graph}, and graph={graph} is another."
        )
    return circuit_graph


def _mask_of(circuit_or_mask: Any) -> Tensor:
    mask = getattr(circuit_or_mask, "mask", circuit_or_mask)
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"expected a Circuit or a mask tensor [n_edges], got {type(mask).__name__}."
        )
    return mask


def _ablation_kind(kind: Ablation | None, corrupted: Tensor | None, prompts: Any) -> Ablation:
    if kind is None:
        kind = "counterfactual"
    check_ablation(kind)
    if kind == "counterfactual" and corrupted is None:
        raise ValueError(
            "counterfactual ablation needs corrupted=…, tokens [batch, pos] of the same shape as "
            "the clean ones; or give ablation='zero', 'mean' or 'mean-positional'."
        )
    if kind != "counterfactual" and corrupted is not None:
        raise ValueError(f"corrupted=… belongs to counterfactual ablation, but ablation={kind!r}.")
    if isinstance(kind, str) and ABLATIONS[kind].needs == "prompts" and prompts is None:
        raise ValueError(
            f"ablation={kind!r} needs prompts=…, token prompts to take the means over."
        )
    return kind
