"""Switches gradients on, whatever mode the caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def with_gradients(what: str) -> Iterator[None]:
    """Gradients are on in this context, even under torch.no_grad or set_grad_enabled(False).

    Args:
        what: needs them, for the error.

    Raises:
        ValueError: inside torch.inference_mode, where no gradients can be computed.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"{what} needs gradients, and torch.inference_mode gives none: call it outside of that "
            "(torch.no_grad and torch.set_grad_enabled(False) do no harm)."
        )
    with torch.enable_grad():
        yield


def needs_gradients(what: str) -> Callable[[F], F]:
    """Decorator: the function runs `with_gradients(what)`."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with with_gradients(what):
                return function(*args, **kwargs)

        return cast(F, call)

    return decorate
