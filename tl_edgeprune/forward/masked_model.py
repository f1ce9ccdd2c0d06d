"""A model with masked edges, by hooks on the model that the user already has.

1. Each source's output is written into the split residual stream as its difference from a
   reference.
2. Each destination reads its own mix of differences. Attention's reads are normalised, projected
   and handed to the model at `hook_q`, `hook_k`, `hook_v`; an MLP's read at `hook_mlp_in`; the
   logits' read at the last residual stream.
3. The model computes everything in between itself. Its own residual stream flows on, unread.

`masked` is the drop-in context; `MaskedModel` is what it is made of, for loops that change the
mask, the reference and the positions from one forward to the next.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_edgeprune.ablation.constants import OPTIMAL, Ablation, Constants
from tl_edgeprune.ablation.fixed import mean_reference, zero_reference
from tl_edgeprune.ablation.recording import record
from tl_edgeprune.ablation.reference import ABLATIONS, ZERO_WITH_BIASES, Reference
from tl_edgeprune.circuits.neurons import MLP, Neurons, kind_of
from tl_edgeprune.forward.buffers import BufferPool
from tl_edgeprune.forward.forward_pass import Forward, Held, Inputs
from tl_edgeprune.forward.neuron_gates import check_constants, check_gates
from tl_edgeprune.forward.self_check import check_neurons_once, check_once, hidden_shape
from tl_edgeprune.graph.edge_graph import EdgeGraph
from tl_edgeprune.hooks.attach import Hook, attached, prepared, refuse_conflicts, refuse_hooks
from tl_edgeprune.hooks.find import find_sites, hidden_points
from tl_edgeprune.hooks.modules import dropouts
from tl_edgeprune.hooks.norms import identity
from tl_edgeprune.hooks.prompt_checks import check_prompts
from tl_edgeprune.hooks.sites import Sites
from tl_edgeprune.hooks.unused_work import idle_work, resting

GENERATORS = ("generate", "generate_stream", "hf_generate", "diffusion_generate")
REFUSED_ARGUMENTS = {
    "past_kv_cache": "a KV cache",
    "past_key_values": "a KV cache",
    "start_at_layer": "start_at_layer",
    "stop_at_layer": "stop_at_layer",
    "inputs_embeds": "inputs_embeds",
    "pixel_values": "pixel_values",
    "shortformer_pos_embed": "shortformer position embeddings",
    "position_ids": "position_ids",
}


def _graph_of(sites: Sites, wanted: EdgeGraph | None) -> EdgeGraph:
    """The model's graph, which is the wanted one."""
    if wanted is None:
        return sites.graph(split_qkv=True, split_embeddings=False)
    actual = sites.graph(split_qkv=wanted.split_qkv, split_embeddings=wanted.split_embeddings)
    actual = actual.at(wanted.spans)
    if wanted != actual:
        raise ValueError(
            f"the circuit or mask is for another model: its graph is {wanted}, this model's "
            f"{actual}."
        )
    return actual


def check_mask(mask: Shaped[Tensor, "..."], graph: EdgeGraph) -> None:
    """Raise ValueError unless `mask` is a float or bool vector over the graph's edges without
    NaN.
    """
    if mask.shape != (graph.n_edges,):
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}, expected ({graph.n_edges},): one value for "
            f"each edge of {graph}, in the order of graph.edges."
        )
    if not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise ValueError(f"the mask has dtype {mask.dtype}, expected floats in [0, 1] or bool.")
    if not bool(torch.isfinite(mask).all()):
        raise ValueError("the mask holds NaN or infinite values; expected numbers in [0, 1].")


def check_ablation(kind: Ablation) -> None:
    """Raise ValueError for an unknown name, TypeError for what is neither a name nor constants."""
    if not isinstance(kind, str | Constants):
        raise TypeError(
            f"ablation={kind!r:.100}: expected one of {', '.join(ABLATIONS)}, or Constants."
        )
    if kind == OPTIMAL:
        raise ValueError(
            "ablation='optimal' needs the constants that were learned: give ablation=constants, "
            "from optimal_constants(model, task, circuit), from EdgePruner(ablation='optimal'), as "
            "result.constants, or from Constants.load(path)."
        )
    if isinstance(kind, str) and kind not in ABLATIONS:
        raise ValueError(
            f"unknown ablation {kind!r}: expected one of {', '.join(ABLATIONS)}, or Constants."
        )


class MaskedModel:
    """A model whose edges are masked, one forward at a time: `run(tokens, mask, reference)`."""

    def __init__(self, model: Any, sites: Sites, graph: EdgeGraph) -> None:
        self.model, self.sites, self.graph = model, sites, graph
        self._dropouts = dropouts(model)
        self.pool = BufferPool()
        self._inputs: Inputs | None = None
        self._forward: Any = None  # a Forward, or the handler of a part
        self.model_forward: Callable[..., Any] = model.forward
        self._names = list(inspect.signature(self.model_forward).parameters)
        self._points = sites.overwritten(model)
        self.neurons: str | None = None  # the kind of gates that it takes, and their shape
        self.neuron_shape = (0, 0)
        self._idle = [
            stand_in
            for block, site in zip(model.blocks, sites.attention, strict=True)
            for stand_in in idle_work(
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
        """Attach hooks for as long as the context lasts; without `set`, the model runs as ever.

        `neurons`: a kind of neurons, or some of that kind, to take gates on.

        The first time that a model is seen, checks on a few tokens that it does split into the
        graph's sources: with every edge kept it must give its own logits.
        """
        sites = find_sites(model)
        graph = _graph_of(sites, graph)
        kind = kind_of(neurons, graph)
        if kind == MLP:
            sites = replace(sites, hidden=hidden_points(model, sites))
        refuse_conflicts(model, sites)
        with ExitStack() as undo:
            undo.enter_context(prepared(model, sites))
            run = cls(model, sites, graph)
            undo.enter_context(attached(model, run._hooks()))
            undo.callback(run._close)
            check_once(run)
            if kind is not None:
                run._take_neurons(kind)
            yield run

    def _take_neurons(self, kind: str) -> None:
        self.neurons = kind
        self.neuron_shape = (self.graph.n_sources, self.sites.attention[0].output.shape[-1])
        if kind == MLP:
            self.neuron_shape = hidden_shape(self)
            check_neurons_once(self)

    def gates_of(
        self, neurons: Neurons | Shaped[Tensor, "..."] | None
    ) -> Shaped[Tensor, "place unit"] | None:
        """Gates as a forward takes them. Raises ValueError for those of another shape, and where no
        kind of neurons was attached.
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
        positions: Int[Tensor, "batch read"] | None = None,
        held: Held | None = None,
        contract: Float[Tensor, "source row d_model"] | None = None,
        whole: bool = False,
        spans: Int[Tensor, "batch pos"] | None = None,
        neurons: Shaped[Tensor, "place unit"] | None = None,
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits under a mask, at `positions` or everywhere.

        `held`: sources to hold. `contract`: the differences that the mask's gradient is taken
        against, where they are not this run's own. `whole`: the mask is 1 everywhere (only its
        gradient is wanted), and reads need no products. `spans`: each position's, where the graph
        has them (it is of no account where not). `neurons`: gates, of the attached kind's shape.
        """
        before = self._inputs
        self._inputs = Inputs(mask, reference, positions, held, contract, whole, spans, neurons)
        try:
            return self._run(tokens)
        finally:
            self._inputs = before

    def set(
        self,
        *,
        mask: Tensor,
        reference: Reference,
        positions: Tensor | None = None,
        spans: Tensor | None = None,
        neurons: Tensor | None = None,
    ) -> None:
        """What the model's own forwards run with, inside `shadowed`."""
        if spans is not None and not self.graph.spans:
            raise ValueError(
                "spans=… belongs to a circuit or mask of a graph with spans, and this one's edges "
                "are the same at every position: leave spans out, or give graph=graph.at(names)."
            )
        self._inputs = Inputs(mask, reference, positions, spans=spans, neurons=neurons)

    def reference(
        self,
        kind: Ablation,
        *,
        corrupted: Int[Tensor, "batch pos"] | None = None,
        prompts: Any = None,
    ) -> Reference:
        """The reference of an ablation; all but the counterfactual one expand to any batch."""
        check_ablation(kind)
        if isinstance(kind, Constants):
            check_constants(self.neurons, kind)
            return kind.reference(self.sites, self.graph)
        if kind == "counterfactual":
            assert corrupted is not None
            nowhere = corrupted.new_empty((len(corrupted), 0))
            return self.record(corrupted, nowhere)[0]
        with self._plain():
            if kind in ("zero", ZERO_WITH_BIASES):
                like, biases = self.sites.attention[0].output, kind == ZERO_WITH_BIASES
                zero = zero_reference(self.sites, self.graph, like, bias_in_heads=biases)
                if self.neurons != MLP:
                    return zero
                n_layers, width = self.neuron_shape
                return replace(zero, hidden=like.new_zeros(n_layers, 1, 1, width))
            self._refuse_dropout()
            return mean_reference(
                self.model, self.sites, self.graph, prompts, positional=kind == "mean-positional"
            )

    def differences(
        self,
        tokens: Int[Tensor, "batch pos"],
        reference: Reference,
        mask: Shaped[Tensor, " edge"] | None = None,
        spans: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "source row d_model"]:
        """Each source's output in the run on `tokens` under `mask` (unmasked by default), less its
        reference.
        """
        whole = mask is None
        if mask is None:
            mask = self.sites.attention[0].output.new_ones(self.graph.n_edges)
            spans = torch.zeros_like(tokens)  # one is as another
        kept: list[Tensor] = []
        nowhere = tokens.new_empty((len(tokens), 0))
        before = self._inputs
        self._inputs = Inputs(mask, reference, nowhere, whole=whole, spans=spans)
        try:
            with torch.no_grad():
                self._run(tokens, keep=kept)
        finally:
            self._inputs = before
        return kept[0]

    def record(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch read"] | None = None
    ) -> tuple[Reference, Float[Tensor, "batch read d_vocab"]]:
        """The unmasked model on `tokens`: its activations as a Reference, and its logits.

        Logits at `positions`, or everywhere. Raises ValueError where dropout is active.
        """
        self._refuse_dropout()
        with self._plain():
            return record(self.model, self.sites, self.graph, tokens, positions)

    @contextmanager
    def shadowed(self) -> Iterator[None]:
        """The model's own `forward` runs masked, and its generators refuse, inside this context."""
        shadows: dict[str, Any] = {"forward": self._seen_run}
        shadows |= {name: _refuse_generation for name in GENERATORS if hasattr(self.model, name)}
        own = self.model.__dict__
        before = {name: own[name] for name in shadows if name in own}
        own.update(shadows)
        try:
            yield
        finally:
            for name in shadows:
                own.pop(name, None)
            own.update(before)

    @contextmanager
    def handled(self, handler: Any) -> Iterator[None]:
        """The hooks go to `handler` (a method each, as `Forward` has them) in this context, where
        parts of the model are run by themselves.
        """
        before, self._forward = self._forward, handler
        try:
            yield
        finally:
            self._forward = before

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """The model unmasked, for a recording in between."""
        before, self._inputs = self._inputs, None
        try:
            yield
        finally:
            self._inputs = before

    def _seen_run(self, *args: Any, **kwargs: Any) -> Any:
        """The user's own call: caches and hooks look on, so that nothing rests."""
        return self._run(*args, seen=True, **kwargs)

    def _run(
        self,
        *args: Any,
        keep: list[Tensor] | None = None,
        seen: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The model's forward, checked before and after; `keep` takes a copy of the differences.

        `seen`: by the user, so that the tokens are looked at, and nothing rests.
        """
        inputs = self._inputs
        if inputs is None:
            return self.model_forward(*args, **kwargs)
        given = args[0] if args else kwargs.get("input", kwargs.get("input_ids"))
        tokens = self._checked_call(given, dict(zip(self._names, args, strict=False)) | kwargs)
        if seen:
            check_prompts(self.model, [tokens], "the batch")
        check_mask(inputs.mask, self.graph)
        self.gates_of(inputs.neurons)
        self._forward = Forward(self.graph, self.sites, self.pool, self.neurons, inputs, tokens)
        try:
            with resting(() if seen else self._idle):
                output = self.model_forward(*args, **kwargs)
            self._forward.finish(output, keep)
            return output
        except BaseException:
            self._forward.abandon()
            raise
        finally:
            self._forward = None

    def _checked_call(self, tokens: Any, call: dict[str, Any]) -> Int[Tensor, "batch pos"]:
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
            given = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(
                f"expected tokens [batch, pos] inside masked, got {given}: use model.to_tokens "
                "first."
            )
        for name, label in REFUSED_ARGUMENTS.items():
            if call.get(name) is not None:
                raise ValueError(
                    f"{label} is not supported inside masked: run whole prompts, from tokens."
                )
        if call.get("use_cache"):
            raise ValueError("a KV cache is not supported inside masked: run with use_cache=False.")
        padding = call.get("attention_mask")
        if padding is not None and not bool(torch.as_tensor(padding).bool().all()):
            raise ValueError(
                "padding masks are not supported inside masked: give prompts of one length a batch."
            )
        self._check_padding(tokens)
        loss = call.get("labels") is not None or call.get("return_type") in ("loss", "both")
        if loss and self._inputs is not None and self._inputs.positions is not None:
            raise ValueError(
                "a loss needs the logits at every position, but positions=… asks for some: take "
                "the logits, or leave positions out."
            )
        refuse_hooks(self._points, inside=True)
        self._refuse_dropout()
        return tokens

    def _refuse_dropout(self) -> None:
        active = self.active_dropout()
        if active:
            raise ValueError(
                f"dropout is active ({active[0]}, training mode): masked runs would differ from "
                "one another. Call model.eval() first."
            )

    def _check_padding(self, tokens: Tensor) -> None:
        # HookedTransformer masks left padding by itself, where its tokenizer pads on the left.
        tokenizer = getattr(self.model, "tokenizer", None)
        if getattr(tokenizer, "padding_side", None) != "left" or tokens.shape[1] < 2:
            return
        pad = getattr(tokenizer, "pad_token_id", None)
        if pad is not None and bool((tokens[:, :2] == pad).all(1).any()):
            raise ValueError(
                "tokens start with padding: give prompts of one length a batch, unpadded."
            )

    def _at(self, method: str, place: tuple[int, ...], tensor: Tensor, hook: Any) -> Tensor | None:
        forward = self._forward
        return None if forward is None else getattr(forward, method)(tensor, *place)

    def active_dropout(self) -> list[str]:
        """Types of the modules that would drop activations now."""
        return [type(module).__name__ for module in self._dropouts if module.training]

    def _hooks(self) -> list[Hook]:
        def at(method: str, *place: int) -> Callable[..., Tensor | None]:
            return partial(self._at, method, place)

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


def _refuse_generation(*_: Any, **__: Any) -> None:
    raise ValueError(
        "generate is not supported inside masked: its prompts grow token by token, and the "
        "reference run has the length of the first. Run whole prompts and read their logits."
    )
