"""auto-circuit 1.0.1 with this package's models, pairs and edge names.

Needs TransformerLens 3 (README.md has installation instructions). auto-circuit expects three names
of older libraries, which are restored here before its first import.

A mask of auto-circuit is 1 if an edge is ablated, so its mask is 1 - z, and the gradient of the
loss in it is EAP's score here. Its losses are means over a batch, and its scores are sums
over batches.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import transformer_lens
from torch import Tensor
from tqdm.auto import tqdm

from tl_edgeprune import Circuit, EdgeGraph, Task
from tl_edgeprune.tasks.batch import Batch


def put_old_names_back() -> None:
    """TransformerLens 2's cache class and module, and `torch.optim.adam` as an attribute."""
    cache = transformer_lens.TransformerLensKeyValueCache
    module = ModuleType("transformer_lens.past_key_value_caching")
    module.HookedTransformerKeyValueCache = cache  # type: ignore[attr-defined]
    sys.modules.setdefault(module.__name__, module)
    transformer_lens.HookedTransformerKeyValueCache = cache
    torch.optim.adam = sys.modules["torch.optim.adam"]  # type: ignore[attr-defined]


put_old_names_back()
import auto_circuit.utils.custom_tqdm

auto_circuit.utils.custom_tqdm.tqdm = partial(tqdm, disable=True)  # before anything imports it
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.ACDC import acdc_prune_scores
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.prune_algos.subnetwork_probing import subnetwork_probing_prune_scores
from auto_circuit.types import PatchType, PruneScores
from auto_circuit.utils.graph_utils import patchable_model
from auto_circuit.utils.patchable_model import PatchableModel

FLAGS = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")


def wrapped(model: Any, outputs: str = "last_seq") -> PatchableModel:
    """A frozen copy of a HookedTransformer with auto-circuit's wrappers in it.

    `outputs`: the positions that count, "last_seq" or "not_first_seq".
    """
    model = copy.deepcopy(model)
    for flag in FLAGS:
        if flag != "use_hook_mlp_in" or not model.cfg.attn_only:
            getattr(model, f"set_{flag}")(True)
    model.requires_grad_(False)
    return patchable_model(
        model, factorized=True, slice_output=outputs, separate_qkv=True, device=model.cfg.device
    )


def loader(pairs: Task | Batch, batch_size: int | None = None) -> PromptDataLoader:
    """Pairs of one length as auto-circuit's batches; it drops an incomplete last one."""
    columns = (pairs.clean, pairs.corrupted, pairs.answers, pairs.distractors)
    dataset = PromptDataset(*(list(column) for column in columns))
    return PromptDataLoader(
        dataset, seq_len=None, diverge_idx=0, batch_size=batch_size or len(pairs), shuffle=False
    )


# ------------------------------------------------------------------------------------ names


def canonical(source: str, destination: str) -> str:
    """`A0.1` and `A3.2.Q` as `a0.h1->a3.h2<q>`."""
    return f"{_canonical(source)}->{_canonical(destination)}"


def _canonical(name: str) -> str:
    whole = {"Resid Start": "input", "Resid End": "logits"}
    if name in whole:
        return whole[name]
    if name.startswith("MLP "):
        return f"m{name.removeprefix('MLP ')}"
    layer, head, *part = name.removeprefix("A").split(".")
    return f"a{layer}.h{head}" + "".join(f"<{p.lower()}>" for p in part)


def places(peer: PatchableModel, graph: EdgeGraph) -> list[tuple[str, tuple[int, ...]]]:
    """The module and index of each edge's mask in auto-circuit, in the graph's order."""
    found = {canonical(e.src.name, e.dest.name): e for e in peer.edges}
    if set(found) != set(graph.edges):
        raise ValueError(f"auto-circuit has {len(found)} edges, {graph} has {graph.n_edges}.")
    return [(found[name].dest.module_name, found[name].patch_idx) for name in graph.edges]


def as_vector(scores: PruneScores, peer: PatchableModel, graph: EdgeGraph) -> Tensor:
    """auto-circuit's scores by module as one vector [n_edges]."""
    return torch.stack([scores[module][index] for module, index in places(peer, graph)])


def as_scores(vector: Tensor, peer: PatchableModel, graph: EdgeGraph) -> PruneScores:
    """Values per edge, [n_edges], as auto-circuit's scores by module."""
    scores = peer.new_prune_scores()
    for value, (module, index) in zip(vector.tolist(), places(peer, graph), strict=True):
        scores[module][index] = value
    return scores


def in_order(peer: PatchableModel, edges: Iterable[str]) -> None:
    """Makes its ACDC visit a destination layer's edges in this order instead of a set's."""
    found = {canonical(e.src.name, e.dest.name): e for e in peer.edges}
    peer.edges = [found[name] for name in edges]  # sorting them by layer is stable


# ---------------------------------------------------------------------------------- methods


def eap(peer: PatchableModel, batches: PromptDataLoader, answers: str = "avg_diff") -> PruneScores:
    """The gradient of minus the answer's logit (or its lead over the distractor's) in the masks."""
    for wrapper in peer.dest_wrappers:
        wrapper.patch_mask.grad = None
    return mask_gradient_prune_scores(
        peer, batches, None, grad_function="logit", answer_function=answers, mask_val=0.0
    )


def circuit_logits(
    peer: PatchableModel, batches: PromptDataLoader, scores: PruneScores, sizes: list[int]
) -> list[Tensor]:
    """Logits [batch, vocab] of the first batch with all but the top edges ablated, by size."""
    outputs = run_circuits(peer, batches, sizes, scores, patch_type=PatchType.TREE_PATCH)
    return [next(iter(outputs[size].values())) for size in sizes]


def acdc_scores(
    peer: PatchableModel, batches: PromptDataLoader, threshold: float, measure: str = "kl_div"
) -> PruneScores:
    """ACDC at one threshold: the threshold itself for removed edges, else infinity."""
    return acdc_prune_scores(
        peer,
        batches,
        None,
        tao_exps=[0],
        tao_bases=[threshold],  # type: ignore[list-item]
        faithfulness_target=measure,
    )


def acdc(
    peer: PatchableModel,
    batches: PromptDataLoader,
    graph: EdgeGraph,
    threshold: float,
    measure: str = "kl_div",
) -> Circuit:
    """What ACDC leaves at one threshold, on the first batch."""
    scores = as_vector(acdc_scores(peer, batches, threshold, measure), peer, graph)
    return Circuit(graph, scores.isinf())


def subnetwork_probing(peer: PatchableModel, batches: PromptDataLoader, steps: int) -> PruneScores:
    """`steps` passes over the batches of subnetwork probing, with the published settings."""
    return subnetwork_probing_prune_scores(
        peer, batches, None, epochs=steps, tree_optimisation=True
    )
