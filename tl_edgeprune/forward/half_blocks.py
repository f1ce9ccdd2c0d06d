"""Half a block at a time: a model's own attention and MLP, run from the middle of the model.

1. One run of the model records how it calls each of its blocks: masks, rotary embeddings and every
   other argument beside the residual stream.
2. Attention from queries, keys and values: the block is called again with the recorded arguments,
   the hooks of `masked_model.py` hand it the queries, keys and values, and the call is left at
   `hook_z`.
3. An MLP from its input: zeros replace attention's output, the hooks hand over the MLP's input, and
   the block's call is left at `hook_mlp_out`.

So norms, rotations, soft caps and experts are the model's own on every class. A block might depend
on something else than its arguments. So `recompute.py` and `search/cuts.py` compare half blocks
with whole runs before they use them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_edgeprune.forward.forward_pass import QkvHandover
from tl_edgeprune.forward.masked_model import MaskedModel
from tl_edgeprune.hooks.sites import AttentionSite
from tl_edgeprune.hooks.unused_work import idle_projections, replaced, skipping

Call = tuple[tuple[Any, ...], dict[str, Any]]


class BrokenHalves(Exception):
    """A model's blocks cannot be run by halves."""


@contextmanager
def reporting_broken_halves() -> Iterator[None]:
    """Raise BrokenHalves for an error that a model's code raises if it is run by halves.

    Running out of memory says nothing about the model, so those errors pass.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        if "can't allocate memory" in str(error):  # on the CPU: a plain RuntimeError
            raise
        raise BrokenHalves(f"{type(error).__name__}: {error}") from error


class _Left(BaseException):
    """Leaves a block or model half-way. Some blocks catch every Exception, so it is none."""


class Blocks:
    """The halves of a model's blocks, inside `MaskedModel.attach`."""

    def __init__(self, run: MaskedModel) -> None:
        self.run, self.sites = run, run.sites
        self._blocks = list(run.model.blocks)
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._outputs: list[Any] = []
        self._projections = [idle_projections(block.attn) for block in self._blocks]

    def record(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Record how the model calls its blocks for this shape of tokens."""
        shape = (int(tokens.shape[0]), int(tokens.shape[1]))
        if shape not in self._calls:
            self._calls[shape], self._outputs = _record(self.run.model, self._blocks, tokens)

    def embedded(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "batch pos d_model"], Tensor | None]:
        """What enters block 0, and the token embedding if the graph splits embeddings."""
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
        """The heads' z for these queries, keys and values, of a shape that was recorded."""
        batch, pos = q.shape[:2]
        half = _Attention(self.sites.attention[layer], layer, (q, k, v))
        zeros = q.new_zeros(batch, pos, self.run.d_model)
        self._leave(layer, zeros, self._calls[batch, pos][layer], half)
        return half.result()

    def mlp(
        self, layer: int, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the stream if its destination reads x (at any positions)."""
        site = self.sites.mlp[layer]
        half = _Mlp(site.norm(x))
        with _giving_zeros(self._blocks[layer].attn, self._outputs[layer], x):
            self._leave(layer, x, next(iter(self._calls.values()))[layer], half)
        return half.result()

    def logits(self, x: Float[Tensor, "batch read d_model"]) -> Float[Tensor, "batch read d_vocab"]:
        """The logits if their destination reads x."""
        norm = getattr(self.run.model, "ln_final", None)
        return unembedded(self.run.model, x if norm is None else norm(x))

    def _leave(self, layer: int, x: Tensor, call: Call, half: Any) -> None:
        args, kwargs = call
        replacements = self._projections[layer] if half.skips_projections else ()
        with self.run.handled(half), skipping(replacements):
            try:
                if args:
                    self._blocks[layer](x, *args[1:], **kwargs)
                else:
                    self._blocks[layer](**kwargs | {"hidden_states": x})
            except _Left:
                return
        raise RuntimeError(f"block {layer} ran to its end: its {half.last_hook} did not fire.")


class _Half:
    """What the hooks do while one half block runs. By default, nothing."""

    last_hook = ""
    skips_projections = False  # whether nothing reads the block's own queries, keys and values

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

    def projected(self, tensor: Tensor, layer: int, index: int) -> Tensor | None: ...

    def heads(self, z: Tensor, layer: int) -> None: ...

    def mlp_in(self, tensor: Tensor, layer: int) -> Tensor | None: ...

    def mlp_out(self, y: Tensor, layer: int) -> None: ...


class _Start(_Half):
    last_hook = "hook_resid_pre"
    embedding: Tensor | None = None

    def embed(self, tensor: Tensor) -> None:
        self.embedding = tensor

    def enter_block(self, resid: Tensor, layer: int) -> None:
        self.leave(resid)


class _Attention(_Half):
    last_hook, skips_projections = "hook_z", True

    def __init__(self, site: AttentionSite, layer: int, qkv: Sequence[Tensor]) -> None:
        super().__init__()
        self.qkv = QkvHandover(site, layer, qkv)

    def projected(self, tensor: Tensor, layer: int, index: int) -> Tensor:
        return self.qkv.take(tensor, index)

    def heads(self, z: Tensor, layer: int) -> None:
        self.qkv.check_all_taken()
        self.leave(z)


class _Mlp(_Half):
    last_hook = "hook_mlp_out"

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
    """The logits of the final norm's output."""
    weight = getattr(model.unembed, "_parameters", {}).get("W_U")
    # HookedTransformer's own call copies its weight, which is large.
    logits = model.unembed(x) if weight is None else x @ weight + model.unembed.b_U
    cap = float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


# ------------------------------------------------------------------------ how the model calls them


def _record(
    model: Any, blocks: list[Any], tokens: Int[Tensor, "batch pos"]
) -> tuple[list[Call], list[Any]]:
    """The arguments of every block, and the form of every attention's output."""
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


def _stateless(arguments: Any) -> Any:
    """Arguments without the residual stream (each call has its own) and without KV caches."""
    if isinstance(arguments, dict):
        without_caches = {k: None if "past" in k else _stateless(v) for k, v in arguments.items()}
        return without_caches | ({"use_cache": False} if "use_cache" in arguments else {})
    if isinstance(arguments, tuple):
        return tuple(_stateless(value) for value in arguments)
    return None if hasattr(arguments, "get_seq_length") else arguments


def _emptied(output: Any) -> Any:
    """Attention's output with None for tensors; `_giving_zeros` fills the first."""
    if isinstance(output, (tuple, list)):
        return tuple(None for _ in output)
    return None


def _giving_zeros(attention: Any, output: Any, x: Tensor) -> AbstractContextManager[None]:
    """Attention that gives zeros of x's shape, in the form of `output`."""
    zeros = x.new_zeros(1).expand(x.shape)
    result = zeros if output is None else (zeros, *output[1:])
    return replaced(attention, "forward", lambda *_, **__: result)
