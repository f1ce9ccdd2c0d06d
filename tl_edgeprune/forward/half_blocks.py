"""Half a block at a time: a model's own attention and MLP, run from the middle of the model.

1. One run of the model records how it calls each of its blocks: masks, rotary embeddings and all
   else that a block is given beside the residual stream.
2. Attention from queries, keys and values: the block is called again as it was, the hooks of
   `masked_model.py` hand it the queries, keys and values, and it is left at `hook_z`.
3. An MLP from its input: attention is stood in for by zeros, the hooks hand over the MLP's input,
   and the block is left at `hook_mlp_out`.

So norms, rotations, soft caps and experts are the model's own on every class. What a block needs
from the run before it and is not in its call would be missed: `cuts.py` checks the whole.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.hooks.sites import AttentionSite
from tl_edgeprune.hooks.unused_work import idle_projections, replaced, resting

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Left(BaseException):
    """A block or model is left half-way. Not an Exception: those, some blocks catch."""


class Blocks:
    """The halves of a model's blocks, inside `MaskedModel.attach`."""

    def __init__(self, run: MaskedModel) -> None:
        self.run, self.sites = run, run.sites
        self._blocks = list(run.model.blocks)
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._idle: list[Any] = []
        self._projections = [idle_projections(block.attn) for block in self._blocks]

    def record(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Learn how the model calls its blocks for this shape of tokens."""
        shape = (int(tokens.shape[0]), int(tokens.shape[1]))
        if shape not in self._calls:
            self._calls[shape], self._idle = _record(self.run.model, self._blocks, tokens)

    def embedded(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "batch pos d_model"], Tensor | None]:
        """What enters block 0, and the token embedding alone where the graph splits embeddings."""
        start = _Start()
        with self.run.handled(start):
            try:
                self.run.model(tokens)
            except _Left:
                return start.result(), start.embedding
        raise RuntimeError("block 0 did not run: its hook_resid_pre did not fire.")

    def attention(
        self,
        layer: int,
        q: Float[Tensor, "batch pos head d_head"],
        k: Float[Tensor, "batch pos kv d_head"],
        v: Float[Tensor, "batch pos kv d_head"],
    ) -> Float[Tensor, "batch pos head d_head"]:
        """What the heads give (z) for these queries, keys and values. The shape is recorded."""
        half = _Attention((q, k, v), self.sites.attention[layer])
        d_model = self.sites.attention[layer].output.shape[-1]
        calls = self._calls[q.shape[0], q.shape[1]]
        self._leave(layer, q.new_zeros(q.shape[0], q.shape[1], d_model), calls[layer], half)
        return half.result()

    def mlp(
        self, layer: int, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the stream where its destination reads x, at any number of
        positions.
        """
        site = self.sites.mlp[layer]
        half = _Mlp(site.norm(x))
        with _standing_in(self._blocks[layer].attn, self._idle[layer], x):
            self._leave(layer, x, next(iter(self._calls.values()))[layer], half)
        return half.result()

    def logits(self, x: Float[Tensor, "batch read d_model"]) -> Float[Tensor, "batch read d_vocab"]:
        """The logits where their destination reads x."""
        norm = getattr(self.run.model, "ln_final", None)
        return unembedded(self.run.model, x if norm is None else norm(x))

    def _leave(self, layer: int, x: Tensor, call: Call, half: Any) -> None:
        args, kwargs = call
        idle = self._projections[layer] if half.projects else ()
        with self.run.handled(half), resting(idle):
            try:
                if args:
                    self._blocks[layer](x, *args[1:], **kwargs)
                else:
                    self._blocks[layer](**kwargs | {"hidden_states": x})
            except _Left:
                return
        raise RuntimeError(f"block {layer} ran to its end: its {half.name} did not fire.")


class _Half:
    """What the hooks of one half block do; those that it has no part in do nothing."""

    name = ""
    projects = False  # whether the block would project queries, keys and values for nothing

    def __init__(self) -> None:
        self._result: Tensor | None = None

    def result(self) -> Tensor:
        assert self._result is not None
        return self._result

    def leave(self, result: Tensor) -> None:
        self._result = result
        raise _Left

    def embed(self, tensor: Tensor) -> None: ...

    def enter_block(self, resid: Tensor, layer: int) -> None: ...

    def projected(self, tensor: Tensor, layer: int, part: int) -> Tensor | None: ...

    def heads(self, z: Tensor, layer: int) -> None: ...

    def mlp_in(self, tensor: Tensor, layer: int) -> Tensor | None: ...

    def mlp_out(self, y: Tensor, layer: int) -> None: ...


class _Start(_Half):
    name = "hook_resid_pre"
    embedding: Tensor | None = None

    def embed(self, tensor: Tensor) -> None:
        self.embedding = tensor

    def enter_block(self, resid: Tensor, layer: int) -> None:
        self.leave(resid)


class _Attention(_Half):
    name, projects = "hook_z", True

    def __init__(self, parts: tuple[Tensor, Tensor, Tensor], site: AttentionSite) -> None:
        super().__init__()
        self.parts, self.site = dict(enumerate(parts)), site

    def projected(self, tensor: Tensor, layer: int, part: int) -> Tensor:
        return self.site.placed(part, self.parts.pop(part).to(tensor.dtype))

    def heads(self, z: Tensor, layer: int) -> None:
        if self.parts:
            raise RuntimeError(f"hook_{'qkv'[min(self.parts)]} of block {layer} did not fire.")
        self.leave(z)


class _Mlp(_Half):
    name = "hook_mlp_out"

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x: Tensor | None = x

    def mlp_in(self, tensor: Tensor, layer: int) -> Tensor:
        x, self.x = self.x, None
        if x is None:
            raise RuntimeError(f"hook_mlp_in of block {layer} fired twice.")
        return x.view(tensor.shape)

    def mlp_out(self, y: Tensor, layer: int) -> None:
        if self.x is not None:
            raise RuntimeError(f"hook_mlp_in of block {layer} did not fire.")
        self.leave(y)


def unembedded(
    model: Any, x: Float[Tensor, "batch read d_model"]
) -> Float[Tensor, "batch read d_vocab"]:
    """The logits of what the final norm gave."""
    weight = getattr(model.unembed, "_parameters", {}).get("W_U")
    # HookedTransformer's own call copies its weight, as large as it is.
    logits = model.unembed(x) if weight is None else x @ weight + model.unembed.b_U
    cap = float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


# --------------------------------------------------------------------------------- how it is called


def _record(
    model: Any, blocks: list[Any], tokens: Int[Tensor, "batch pos"]
) -> tuple[list[Call], list[Any]]:
    """The calls of every block, and what every attention gives back."""
    calls: list[Call] = []
    outputs: list[Any] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args:
            kwargs = kwargs | {"hidden_states": None}
        calls.append(((None, *_stateless(args[1:])) if args else (), _stateless(kwargs)))

    def after(module: Any, args: Any, output: Any) -> None:
        outputs.append(_emptied(output))
        if len(outputs) == len(blocks):
            raise _Left

    with ExitStack() as undo:
        for block in blocks:
            handle = block.register_forward_pre_hook(before, with_kwargs=True)
            undo.callback(handle.remove)
            undo.callback(block.attn.register_forward_hook(after).remove)
        try:
            with torch.no_grad():
                model(tokens)
        except _Left:
            pass
    if len(calls) != len(blocks) or len(outputs) != len(blocks):
        raise RuntimeError(f"{len(calls)} of {len(blocks)} blocks were called.")
    return calls, outputs


def _stateless(given: Any) -> Any:
    """Arguments without the residual stream (each call has its own) and without KV caches."""
    if isinstance(given, dict):
        kept = {name: None if "past" in name else _stateless(v) for name, v in given.items()}
        return kept | ({"use_cache": False} if "use_cache" in given else {})
    if isinstance(given, tuple):
        return tuple(_stateless(value) for value in given)
    return None if hasattr(given, "get_seq_length") else given


def _emptied(output: Any) -> Any:
    """What attention gave back, with None for tensors: `_standing_in` fills the first."""
    if isinstance(output, (tuple, list)):
        return tuple(None for _ in output)
    return None


def _standing_in(attention: Any, output: Any, x: Tensor) -> AbstractContextManager[None]:
    """Attention that gives zeros of x's shape, in the form of `output`."""
    zeros = x.new_zeros(1).expand(x.shape)
    given = zeros if output is None else (zeros, *output[1:])
    return replaced(attention, "forward", lambda *_, **__: given)
