"""A model with masked edges, by hooks on the model that the user already has.

1. Each source's output is written into the split residual stream as its difference from a
   reference.
2. Each destination reads its own mix of differences. Attention's reads are normalised, projected
   and handed to the model at `hook_q`, `hook_k`, `hook_v`; an MLP's read at `hook_mlp_in`; the
   logits' read at the last residual stream.
3. The model computes everything in between itself. Nothing reads its own residual stream.

`masked` is the public context; it is built on `MaskedModel`, which serves loops that change the
mask, the reference and the positions from one forward to the next.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_edgeprune.ablation.constants import Ablation, Constants
from tl_edgeprune.ablation.kinds import ABLATIONS, check_ablation
from tl_edgeprune.ablation.recording import record
from tl_edgeprune.ablation.reference import Reference
from tl_edgeprune.circuits.neurons import MLP, Neurons, kind_of
from tl_edgeprune.forward.buffers import BufferPool
from tl_edgeprune.forward.call_checks import (
    GENERATORS,
    check_call,
    check_mask,
    refuse_dropout,
    refuse_generation,
)
from tl_edgeprune.forward.forward_pass import Forward, ForwardInputs, HeldSources
from tl_edgeprune.forward.neuron_gates import check_constants, check_gates
from tl_edgeprune.forward.self_check import check_neurons_once, check_once, hidden_shape
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.attach import (
    Hook,
    hooks_attached,
    model_prepared,
    refuse_conflicts,
    refuse_hooks,
)
from tl_edgeprune.hooks.find import find_sites, hidden_points
from tl_edgeprune.hooks.modules import dropouts
from tl_edgeprune.hooks.norms import identity
from tl_edgeprune.hooks.prompt_checks import check_prompts
from tl_edgeprune.hooks.sites import Sites
from tl_edgeprune.hooks.unused_work import idle_work, skipping
from tl_edgeprune.tasks.batch import Batch


def _graph_of(sites: Sites, graph: EdgeGraph | None) -> EdgeGraph:
    """The model's graph. Raises ValueError if `graph` is that of another model."""
    if graph is None:
        return sites.graph(split_qkv=True, split_embeddings=False)
    actual = sites.graph(split_qkv=graph.split_qkv, split_embeddings=graph.split_embeddings)
    actual = actual.at(graph.spans)
    if graph != actual:
        raise ValueError(
            f"the circuit or mask is for another model: its graph is {graph}, this model's "
            f"{actual}."
        )
    return actual


@runtime_checkable
class PreparedBatch(Protocol):
    """A batch of pairs on the model's device, with the reference of its removed edges."""

    batch: Batch
    reference: Reference


class MaskedModel:
    """A model whose edges are masked, one forward at a time: `run(tokens, mask, reference)`."""

    def __init__(self, model: Any, sites: Sites, graph: EdgeGraph) -> None:
        self.model, self.sites, self.graph = model, sites, graph
        self._dropouts = dropouts(model)
        self.pool = BufferPool()
        self._inputs: ForwardInputs | None = None
        self._forward: Any = None  # a Forward, or another handler of the hooks (`handled`)
        self.model_forward: Callable[..., Any] = model.forward
        self._parameter_names = list(inspect.signature(self.model_forward).parameters)
        self._points = sites.overwritten(model)
        self.neurons: str | None = None  # the kind of neurons that have gates, and the gates' shape
        self.neuron_shape = (0, 0)
        self._idle = [
            replacement
            for block, site in zip(model.blocks, sites.attention, strict=True)
            for replacement in idle_work(
                block, norm_precedes=site.norm is not identity, parallel=sites.parallel
            )
        ]

    @property
    def device(self) -> torch.device:
        """Where tokens, masks and gates go: the device of the first layer."""
        return self.sites.attention[0].output.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.sites.attention[0].output.dtype

    @property
    def d_model(self) -> int:
        """The residual stream's size."""
        return self.sites.attention[0].output.shape[-1]

    @classmethod
    @contextmanager
    def attach(
        cls,
        model: Any,
        graph: EdgeGraph | None = None,
        neurons: Neurons | Tensor | str | None = None,
    ) -> Iterator[MaskedModel]:
        """Attach hooks for as long as the context lasts. Without `set`, the model runs unmasked.

        Args:
            graph: the graph of the masks; the model's own by default.
            neurons: a kind of neurons, or some of that kind, to put gates on.

        The first run of a model checks on a few tokens that it splits into the graph's sources:
        with every edge kept it must give its own logits. Raises NotImplementedError if it does
        not, and ValueError for the graph of another model.
        """
        sites = find_sites(model)
        graph = _graph_of(sites, graph)
        kind = kind_of(neurons, graph)
        if kind == MLP:
            sites = replace(sites, hidden=hidden_points(model, sites))
        refuse_conflicts(model, sites)
        with ExitStack() as undo:
            undo.enter_context(model_prepared(model, sites))
            run = cls(model, sites, graph)
            undo.enter_context(hooks_attached(model, run._hooks()))
            undo.callback(run._close)
            check_once(run)
            if kind is not None:
                run._take_neurons(kind)
            yield run

    def _take_neurons(self, kind: str) -> None:
        self.neurons = kind
        self.neuron_shape = (self.graph.n_sources, self.d_model)
        if kind == MLP:
            self.neuron_shape = hidden_shape(self)
            check_neurons_once(self)

    def gates_of(
        self, neurons: Neurons | Shaped[Tensor, "..."] | None
    ) -> Shaped[Tensor, "place unit"] | None:
        """The gates of neurons, as `__call__` takes them.

        Raises ValueError for gates of another shape, and if no kind of neurons was attached.
        """
        gates = neurons.mask if isinstance(neurons, Neurons) else neurons
        if gates is not None and self.neurons is None:
            raise ValueError("this run takes no gates on neurons: attach it with neurons=….")
        if gates is not None:
            check_gates(gates, self.neuron_shape)
        return gates

    def __call__(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Shaped[Tensor, " edge"],
        reference: Reference,
        read_positions: Int[Tensor, "batch read"] | None = None,
        held: HeldSources | None = None,
        contract: Float[Tensor, "source row d_model"] | None = None,
        whole: bool = False,
        spans: Int[Tensor, "batch pos"] | None = None,
        neurons: Shaped[Tensor, "place unit"] | None = None,
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits under a mask, at `read_positions` or everywhere.

        Args:
            held: sources whose outputs are held at a share of their difference.
            contract: the differences that the mask's gradient is taken against; this run's own by
                default.
            whole: says that the mask is 1 everywhere and only its gradient is needed: reads are
                then sums, without products.
            spans: the span of each position; ignored if the graph has no spans.
            neurons: gates, of the shape of the attached kind (`neuron_shape`).
        """
        inputs = ForwardInputs(
            mask, reference, read_positions, held, contract, whole, spans, neurons
        )
        with self._inputs_set_to(inputs):
            return self._run(tokens)

    def logits(
        self,
        prepared: PreparedBatch,
        mask: Shaped[Tensor, " edge"],
        reference: Reference | None = None,
        **options: Any,
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits of a batch of pairs under a mask, at the batch's read positions.

        Args:
            prepared: the batch, on the model's device, with its reference (of runs/targets.py).
            reference: what removed edges carry, instead of the batch's own reference.
            options: `held`, `contract`, `whole` and `neurons` of `__call__`.
        """
        batch = prepared.batch
        reference = prepared.reference if reference is None else reference
        return self(
            batch.clean, mask, reference, batch.read_positions, spans=batch.spans, **options
        )

    def set(
        self,
        *,
        mask: Tensor,
        reference: Reference,
        read_positions: Tensor | None = None,
        spans: Tensor | None = None,
        neurons: Tensor | None = None,
    ) -> None:
        """Set what the model's own forward runs with, inside `shadowed`."""
        if spans is not None and not self.graph.spans:
            raise ValueError(
                "spans=… belongs to a circuit or mask of a graph with spans, and this one's edges "
                "are the same at every position: leave spans out, or give graph=graph.at(names)."
            )
        self._inputs = ForwardInputs(mask, reference, read_positions, spans=spans, neurons=neurons)

    def reference(
        self,
        kind: Ablation,
        *,
        corrupted: Int[Tensor, "batch pos"] | None = None,
        prompts: Any = None,
    ) -> Reference:
        """The reference of an ablation: of any batch, except under counterfactual ablation.

        Args:
            kind: the ablation.
            corrupted: the corrupted prompts of the batch, for counterfactual ablation.
            prompts: the prompts that means are taken over.
        """
        check_ablation(kind)
        if isinstance(kind, Constants):
            check_constants(self.neurons, kind)
            return kind.reference(self.sites, self.graph)
        ablation = ABLATIONS[kind]
        if ablation.needs is not None:
            refuse_dropout(self.active_dropout())
        with self._inputs_set_to(None):
            needed = corrupted if ablation.needs == "corrupted" else prompts
            reference = ablation.build(self.model, self.sites, self.graph, needed)
        if self.neurons != MLP or reference.hidden is not None:
            return reference
        n_layers, width = self.neuron_shape
        return replace(reference, hidden=reference.inputs.new_zeros(n_layers, 1, 1, width))

    def differences(
        self,
        tokens: Int[Tensor, "batch pos"],
        reference: Reference,
        mask: Shaped[Tensor, " edge"] | None = None,
        spans: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "source row d_model"]:
        """Each source's output in the run on `tokens` under `mask` (unmasked by default), minus its
        reference. Rows are batch * pos.
        """
        unmasked = mask is None
        if mask is None:
            mask = torch.ones(self.graph.n_edges, device=self.device, dtype=self.dtype)
            spans = torch.zeros_like(tokens)  # with every edge kept, the span changes nothing
        copies: list[Tensor] = []
        no_positions = tokens.new_empty((len(tokens), 0))
        inputs = ForwardInputs(mask, reference, no_positions, whole=unmasked, spans=spans)
        with torch.no_grad(), self._inputs_set_to(inputs):
            self._run(tokens, differences=copies)
        return copies[0]

    def record(
        self,
        tokens: Int[Tensor, "batch pos"],
        read_positions: Int[Tensor, "batch read"] | None = None,
    ) -> tuple[Reference, Float[Tensor, "batch read d_vocab"]]:
        """The unmasked model on `tokens`: its activations as a Reference, and its logits.

        Logits at `read_positions`, or everywhere. Raises ValueError if dropout is active.
        """
        refuse_dropout(self.active_dropout())
        with self._inputs_set_to(None):
            return record(self.model, self.sites, self.graph, tokens, read_positions)

    @contextmanager
    def shadowed(self) -> Iterator[None]:
        """Inside this context, the model's own `forward` runs masked and its generators refuse."""
        shadows: dict[str, Any] = {"forward": self._user_call}
        shadows |= {name: refuse_generation for name in GENERATORS if hasattr(self.model, name)}
        attributes = self.model.__dict__
        overwritten = {name: attributes[name] for name in shadows if name in attributes}
        attributes.update(shadows)
        try:
            yield
        finally:
            for name in shadows:
                attributes.pop(name, None)
            attributes.update(overwritten)

    @contextmanager
    def handled(self, handler: Any) -> Iterator[None]:
        """Inside this context the hooks call `handler` (with one method per hook, as `Forward`),
        for parts of the model that are run by themselves.
        """
        previous, self._forward = self._forward, handler
        try:
            yield
        finally:
            self._forward = previous

    @contextmanager
    def with_sites(self, sites: Sites) -> Iterator[None]:
        """Inside this context masked runs use these sites: the same hook points, other norms."""
        previous, self.sites = self.sites, sites
        try:
            yield
        finally:
            self.sites = previous

    @contextmanager
    def _inputs_set_to(self, inputs: ForwardInputs | None) -> Iterator[None]:
        """Inside this context the model runs with these inputs; None: unmasked."""
        previous, self._inputs = self._inputs, inputs
        try:
            yield
        finally:
            self._inputs = previous

    def _user_call(self, *args: Any, **kwargs: Any) -> Any:
        """A call by the user: hooks may read any activation, so nothing is skipped."""
        return self._run(*args, by_user=True, **kwargs)

    def _run(
        self,
        *args: Any,
        differences: list[Tensor] | None = None,
        by_user: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The model's forward, checked before and after.

        Args:
            differences: a list that gets a copy of the sources' differences.
            by_user: check the tokens as well, and skip no computation.
        """
        inputs = self._inputs
        if inputs is None:
            return self.model_forward(*args, **kwargs)
        first = args[0] if args else kwargs.get("input", kwargs.get("input_ids"))
        arguments = dict(zip(self._parameter_names, args, strict=False)) | kwargs
        tokens = self._checked_call(first, arguments)
        if by_user:
            check_prompts(self.model, [tokens], "the batch")
        check_mask(inputs.mask, self.graph)
        self.gates_of(inputs.neurons)
        self._forward = Forward(self.graph, self.sites, self.pool, self.neurons, inputs, tokens)
        try:
            with skipping(() if by_user else self._idle):
                output = self.model_forward(*args, **kwargs)
            self._forward.finish(output, differences)
            return output
        except BaseException:
            self._forward.abandon()
            raise
        finally:
            self._forward = None

    def _checked_call(self, tokens: Any, arguments: dict[str, Any]) -> Int[Tensor, "batch pos"]:
        some_positions = self._inputs is not None and self._inputs.read_positions is not None
        tokens = check_call(self.model, tokens, arguments, some_positions=some_positions)
        refuse_hooks(self._points, inside=True)
        refuse_dropout(self.active_dropout())
        return tokens

    def active_dropout(self) -> list[str]:
        """Types of the modules that would drop activations now."""
        return [type(module).__name__ for module in self._dropouts if module.training]

    def _call_handler(
        self, method: str, indices: tuple[int, ...], tensor: Tensor, hook: Any
    ) -> Tensor | None:
        handler = self._forward
        return None if handler is None else getattr(handler, method)(tensor, *indices)

    def _hooks(self) -> list[Hook]:
        def at(method: str, *indices: int) -> Callable[..., Tensor | None]:
            return partial(self._call_handler, method, indices)

        sites = self.sites
        hooks = [(sites.embed, at("embed"))] if self.graph.split_embeddings else []
        for layer, site in enumerate(sites.attention):
            hooks.append((f"{sites.blocks[layer]}.hook_resid_pre", at("enter_block", layer)))
            hooks += [
                (name, at("projected", layer, part))
                for part, name in enumerate((site.q, site.k, site.v))
            ]
            hooks.append((site.z, at("heads", layer)))
        for layer, mlp in enumerate(sites.mlp):
            hooks += [(mlp.read, at("mlp_in", layer)), (mlp.write, at("mlp_out", layer))]
        hooks += [(name, at("hidden", layer)) for layer, name in enumerate(sites.hidden)]
        hooks.append((sites.final, at("logits_in")))
        return hooks + ([(sites.cut, at("cut"))] if sites.cut else [])

    def _close(self) -> None:
        self._inputs = self._forward = None
