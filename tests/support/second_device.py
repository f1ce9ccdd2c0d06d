"""A second device, pretended on the CPU: what would raise on a GPU raises here.

Tensors "on" the device are the CPU's own, their storages marked, so that views, `.data`, saved
tensors and in-place operations carry the mark as a real device's memory would.

1. A function mode sees every Python call before torch does: it answers `.device`, marks what is
   made with `device=…`, and turns `.to`, `.cpu` and `.cuda` into marked copies, whose backward goes
   back to where they came from.
2. A dispatch mode sees every operation of torch, autograd's too: it refuses tensors of two devices
   (but for a CPU number among the operands of a pointwise operation, and a CPU index), a generator
   of another device, and products of integers, which CUDA does not have; and it marks the results.
3. The device can run out of memory: from its n-th allocation on it raises torch.OutOfMemoryError.
4. What makes the CPU wait for the device is counted by line of the package: reading a number, a
   copy (but for `non_blocking` ones), and operations whose result's size depends on values.

What stays unseen: kernels that CUDA lacks, their rounding, streams, and memory.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ANY = "any"  # zeros that autograd makes by itself: they are where they are wanted
Place = torch.device | str

aten = torch.ops.aten
COPIES = (aten.copy_, aten._to_copy, aten._foreach_copy_)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.mv, aten.addmv, aten.dot)
WAITS = (
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave),
)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of arguments or results, in their order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for part in tree for tensor in tensors_in(part)]


def place_of(tensor: Tensor) -> Place:
    """Where a tensor pretends to be."""
    with torch._C.DisableTorchFunction():
        if tensor.device.type != "cpu":
            return tensor.device  # meta
        return getattr(tensor.untyped_storage(), "place", CPU)


def put(result: Any, place: Place) -> Any:
    """Mark the tensors of a result."""
    with torch._C.DisableTorchFunction():
        for tensor in tensors_in(result):
            if tensor.device.type == "cpu":
                tensor.untyped_storage().place = place
    return result


class _Moved(torch.autograd.Function):
    """A copy on another device; its gradient is moved back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: torch.device) -> Tensor:
        ctx.source = place_of(x)
        with torch._C.DisableTorchFunction():
            return put(x.detach().clone(), to)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Moved.apply(grad, ctx.source), None


def supported() -> bool:
    """Whether this torch has what it takes: marks that last, and one way into autograd."""
    if not hasattr(torch.autograd, "_engine_run_backward"):
        return False
    marked = put(torch.zeros(2), GPU)
    return place_of(marked[0]) == GPU


class OtherDevice(TorchFunctionMode):
    """`with OtherDevice() as device:`; `device.waits` counts what made the CPU wait, by line."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.allocations = 0
        self.most_allocations: int | None = None
        self.near: Place = ANY  # where the arguments of the call under way are
        self._undo = contextlib.ExitStack()
        tensor = torch.Tensor
        self._answers: dict[Any, Callable[..., Any]] = {
            tensor.device.__get__: lambda x, *_: place_of(x),
            tensor.is_cuda.__get__: lambda x, *_: place_of(x) == GPU,
            tensor.is_cpu.__get__: lambda x, *_: place_of(x) == CPU,
            tensor.get_device: lambda x: 0 if place_of(x) == GPU else -1,
            tensor.to: self._to,
            tensor.cpu: lambda x, *_, **__: self._move(x, CPU),
            tensor.cuda: lambda x, *_, **__: self._move(x, GPU),
            tensor.numpy: self._read_on_cpu(tensor.numpy),
            tensor.__array__: self._read_on_cpu(tensor.__array__),
            tensor.tolist: self._tolist,
            tensor.__deepcopy__: lambda x, memo: put(tensor.__deepcopy__(x, memo), place_of(x)),
        }

    def __enter__(self) -> OtherDevice:
        for name in ("synchronize", "reset_peak_memory_stats"):
            self._undo.enter_context(mock.patch.object(torch.cuda, name, lambda *_: None))
        for name in ("memory_allocated", "max_memory_allocated"):
            self._undo.enter_context(mock.patch.object(torch.cuda, name, lambda *_: 0))
        run = torch.autograd._engine_run_backward  # Tensor.backward calls it without the mode
        self._undo.enter_context(
            mock.patch.object(torch.autograd, "_engine_run_backward", self._engine(run))
        )
        self._undo.enter_context(_Operations(self))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.close()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in self._answers:
            return self._answers[function](*args, **kwargs)
        wanted = kwargs.get("device")
        if wanted is not None:
            wanted = _canonical(wanted)
            if wanted.type != "meta":
                kwargs = kwargs | {"device": CPU}
            _check_generator(kwargs.get("generator"), wanted)
        before, self.near = self.near, _common([*args, *kwargs.values()])
        try:
            if wanted is not None and function is torch.as_tensor and isinstance(args[0], Tensor):
                return self._move(args[0], wanted).to(**kwargs)
            result = function(*args, **kwargs)
        finally:
            self.near = before
        return result if wanted is None or wanted.type == "meta" else put(result, wanted)

    def allocate(self) -> None:
        """Count an allocation, if memory is left."""
        if self.most_allocations is not None and self.allocations >= self.most_allocations:
            raise torch.OutOfMemoryError("CUDA out of memory: the pretended device is full.")
        self.allocations += 1

    def wait(self, what: str) -> None:
        """Count a wait at the package's line."""
        frame = sys._getframe(1)
        while frame.f_back is not None and "/tl_edgeprune/" not in frame.f_code.co_filename:
            frame = frame.f_back
        place = frame.f_code.co_filename.rpartition("/tl_edgeprune/")[2]
        self.waits[f"{place}:{frame.f_lineno} {what}"] += 1

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()]
        wanted = next((place_of(a) for a in given if isinstance(a, Tensor)), None)
        named = [a for a in given if isinstance(a, str | torch.device) or type(a) is int]
        to = _canonical(named[0]) if named else (wanted or place_of(x))
        if to.type == "meta" or x.is_meta:
            return x.to(*args, **kwargs)
        strip = [CPU if a is not None and any(a is n for n in named) else a for a in args]
        kwargs = {k: CPU if any(a is n for n in named) else a for k, a in kwargs.items()}
        moved = self._move(x, to, kwargs.get("non_blocking", False))
        return put(moved.to(*strip, **kwargs), to)

    def _move(self, x: Tensor, to: torch.device, non_blocking: bool = False) -> Tensor:
        if place_of(x) == to:
            return x
        if to == CPU or not non_blocking:
            self.wait(f"copy to {'the CPU' if to == CPU else 'the device'}")
        return _Moved.apply(x, to)

    def _read_on_cpu(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def checked(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if place_of(x) != CPU:
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use .cpu()")
            return read(x, *args, **kwargs)

        return checked

    def _tolist(self, x: Tensor) -> Any:
        if place_of(x) == GPU:
            self.wait("tolist")
        return x.tolist()

    def _engine(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Backward passes run in the mode, which a call that it sees has switched off."""

        def backward(*args: Any, **kwargs: Any) -> Any:
            again = nullcontext() if _get_current_function_mode() is self else _Again(self)
            before, self.near = self.near, ANY
            try:
                with again:
                    return run(*args, **kwargs)
            finally:
                self.near = before

        return backward


class _Again(TorchFunctionMode):
    def __init__(self, device: OtherDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, *call: Any) -> Any:
        return self.device.__torch_function__(*call)


class _Operations(TorchDispatchMode):
    """Every operation's operands must be on one device; its results are there too."""

    def __init__(self, device: OtherDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            operands = tensors_in([args, kwargs])
            place = self._checked(function, args, operands)
            _check_generator(kwargs.get("generator"), place)
            waits = function.overloadpacket in WAITS
            if waits and place == GPU:
                self.device.wait(function.overloadpacket.__name__)
            known = {t.untyped_storage()._cdata for t in operands}
            result = function(*args, **kwargs)
            for tensor in tensors_in(result):
                storage = tensor.untyped_storage()
                if storage._cdata not in known and not hasattr(storage, "place"):
                    put(tensor, place)
                    if place == GPU:
                        self.device.allocate()
        return result

    def _checked(self, function: Any, args: tuple[Any, ...], operands: list[Tensor]) -> Place:
        """Where an operation runs. Raises what CUDA raises."""
        packet = function.overloadpacket
        if not operands:
            return self.device.near
        if packet in COPIES:
            return self._copied(packet, operands)
        if packet in INDEXED:
            return self._indexed(operands[0], [i for i in args[1] if i is not None], args[2:])
        places = [place_of(t) for t in operands]
        if packet == aten.fill_:  # takes a number from anywhere
            if places[-1] == GPU and places[0] == CPU:
                self.device.wait("fill_")
            return places[0]
        numbers = torch.Tag.pointwise in function.tags or packet.__name__.startswith("_foreach")
        written = function._schema.is_mutable
        counted = {
            place
            for n, (t, place) in enumerate(zip(operands, places, strict=True))
            if place != ANY
            and not (numbers and t.dim() == 0 and place == CPU and (n or not written))
        }
        if len(counted) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {function} has "
                f"{[(tuple(t.shape), str(p)) for t, p in zip(operands, places, strict=True)]}."
            )
        place = counted.pop() if counted else (ANY if ANY in places else CPU)
        if place != ANY:
            put([t for t, p in zip(operands, places, strict=True) if p == ANY], place)
        whole = not (operands[0].is_floating_point() or operands[0].is_complex())
        if place == GPU and packet in PRODUCTS and whole:
            raise RuntimeError(
                f"{packet.__name__}_cuda is not implemented for {operands[0].dtype}."
            )
        return place

    def _copied(self, packet: Any, operands: list[Tensor]) -> Place:
        to = place_of(operands[0])
        if packet != aten._to_copy and to == CPU and place_of(operands[-1]) == GPU:
            self.device.wait("copy to the CPU")
        return to

    def _indexed(self, x: Tensor, indices: list[Tensor], values: tuple[Any, ...]) -> Place:
        place = place_of(x)
        if any(place_of(i) not in (CPU, place) for i in indices):
            raise RuntimeError(
                f"indices should be either on cpu or on the same device as the indexed ({place})"
            )
        for value in values:
            if isinstance(value, Tensor) and place_of(value) != place and value.dim() > 0:
                raise RuntimeError(f"a value on {place_of(value)} for a tensor on {place}")
        if place == GPU and any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.device.wait("boolean index")
        if place == GPU and any(place_of(i) == CPU for i in indices):
            self.device.wait("index from the CPU")
        return place


def _canonical(device: Any) -> torch.device:
    device = torch.device("cuda", device) if type(device) is int else torch.device(device)
    return GPU if device.type == "cuda" else device


def _common(tree: Any) -> Place:
    """The device of the tensors of a call, if any is there, else the CPU."""
    return GPU if any(place_of(t) == GPU for t in tensors_in(tree)) else CPU


def _check_generator(generator: torch.Generator | None, place: Place) -> None:
    if generator is not None and place == GPU:
        raise RuntimeError(
            f"Expected a 'cuda' device type for generator but found {generator.device}"
        )
