"""A block's normalisation as a plain function, for the many split inputs of one read.

TransformerLens' own modules fire their hook points and build several temporaries per call; a read
of 36 destinations needs one fused call. `norm_function` gives a function with the module's own
numerics (its weight, its epsilon, the precision it computes in).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Norm = Callable[[Tensor], Tensor]
HALF = (torch.float16, torch.bfloat16)


def identity(x: Tensor) -> Tensor:
    return x


def norm_function(module: Any) -> Norm:
    """The function that a TransformerLens norm module computes, from [..., d_model] to the same.

    Knows HookedTransformer's four norms and the Bridge's wrapped ones. Of any other module, the
    wrapped original is called if there is one, else the module itself.
    """
    original = getattr(module, "original_component", None)
    if original is not None:
        return _bridge_norm(module, original)
    name = type(module).__name__
    if name in ("LayerNorm", "LayerNormPre"):
        return LayerNorm(getattr(module, "w", None), getattr(module, "b", None), module.eps)
    if name in ("RMSNorm", "RMSNormPre"):
        return RMSNorm(getattr(module, "w", None), module.eps, float32=False)
    return cast(Norm, module)


def _bridge_norm(module: Any, original: Any) -> Norm:
    """The wrapped module's norm, or the Bridge's own formula if its flags say so."""
    if isinstance(original, torch.nn.Identity):
        return identity
    if not hasattr(module, "use_native_layernorm_autograd"):
        return cast(Norm, original)
    wrapped = module.use_native_layernorm_autograd or getattr(
        module.config, "layer_norm_folding", False
    )
    if type(original) is torch.nn.LayerNorm:  # a subclass may use its weight differently (Nemotron)
        eps = original.eps if wrapped else module.config.eps
        return LayerNorm(original.weight, original.bias, eps)
    if not wrapped:
        return _bridge_formula(module)
    if "RMSNorm" not in type(original).__name__ or not hasattr(original, "weight"):
        return cast(Norm, original)
    eps = getattr(original, "variance_epsilon", getattr(original, "eps", None))
    if not isinstance(eps, float):
        return cast(Norm, original)
    weight = original.weight + 1.0 if weight_is_offset(module) else original.weight
    return RMSNorm(weight, eps, float32=True)


def _bridge_formula(module: Any) -> Norm:
    """NormalizationBridge's own arithmetic, without a weight in its parameter-free forms."""
    parameter_free = type(module).__name__ in ("LayerNormPreBridge", "RMSNormPreBridge")
    weight = None if parameter_free else module.weight
    if weight is not None and weight_is_offset(module):
        weight = weight + 1.0
    if _is_rms(module):
        return RMSNorm(weight, module.config.eps, float32=False)
    bias = None if parameter_free else getattr(module.original_component, "bias", None)
    return LayerNorm(weight, bias, module.config.eps)


def weight_is_offset(module: Any) -> bool:
    """Whether a Bridge norm multiplies by 1 + weight (Gemma)."""
    offset = getattr(module, "uses_weight_offset", None)
    if offset is None:  # TransformerLens 3
        offset = _is_rms(module) and getattr(module.config, "rmsnorm_uses_offset", False)
    return bool(offset)


def _is_rms(module: Any) -> bool:
    rms = getattr(module, "uses_rms_norm", None)
    return bool(getattr(module.config, "uses_rms_norm", False) if rms is None else rms)


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / sqrt(var + eps) * weight + bias."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def frozen(self, x: Tensor) -> Tensor:
        """The same, but the gradient treats the division by the deviation as a constant."""
        centred = x - x.mean(-1, keepdim=True)
        y = centred * inverse_rms(centred.detach(), self.eps)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class RMSNorm:
    """x / sqrt(mean of squares + eps) * weight, computed in float32 if `float32`."""

    weight: Tensor | None
    eps: float
    float32: bool

    def __call__(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps, self.compute_dtype(x.dtype))

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a tensor of this dtype is normalised."""
        return torch.float32 if self.float32 or dtype in HALF else dtype

    def scale(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"]:
        """The factor that each row is scaled by, without a copy of x."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.compute_dtype(x.dtype))
        return torch.rsqrt(size.square() / x.shape[-1] + self.eps)

    def frozen(self, x: Tensor) -> Tensor:
        """The same, but the gradient treats the division by the root mean square as a constant."""
        y = x * inverse_rms(x.detach().float(), self.eps).to(x.dtype)
        return y if self.weight is None else y * self.weight


def inverse_rms(x: Float[Tensor, "... d"], eps: float) -> Float[Tensor, "... 1"]:
    """1 / sqrt(mean of squares + eps), the factor that root-mean-square norms scale by."""
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class _RMSNorm(torch.autograd.Function):
    """RMS norm that keeps only its input and one number per row for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, compute: torch.dtype
    ) -> Tensor:
        wide = x.to(compute)
        scale = inverse_rms(wide, eps)
        ctx.save_for_backward(x, scale, weight)
        y = (wide * scale).to(x.dtype)
        return y if weight is None else weight * y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, scale, weight = ctx.saved_tensors
        weighted = (grad if weight is None else grad * weight).to(scale.dtype)
        unit = x.to(scale.dtype) * scale
        along = (weighted * unit).mean(-1, keepdim=True)
        return ((weighted - unit * along) * scale).to(x.dtype), None, None, None
