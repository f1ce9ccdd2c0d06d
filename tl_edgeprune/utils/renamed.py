"""Former names of arguments, which still work and warn."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class")


def renamed_argument(former: str, name: str) -> Callable[[Function], Function]:
    """A decorator of a function whose argument `name` was called `former`.

    Raises TypeError if both are given.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            if former in keywords:
                if name in keywords:
                    raise TypeError(f"{name} and {former}, its former name, are both given.")
                warn_of_former_name(former, name)
                keywords[name] = keywords.pop(former)
            return function(*arguments, **keywords)

        return call  # type: ignore[return-value]

    return decorate


def renamed_field(former: str, name: str) -> Callable[[type[Class]], type[Class]]:
    """A decorator of a class whose constructor's argument `name` was called `former`."""

    def decorate(cls: type[Class]) -> type[Class]:
        cls.__init__ = renamed_argument(former, name)(cls.__init__)  # type: ignore[method-assign]
        return cls

    return decorate


def warn_of_former_name(former: str, name: str, stacklevel: int = 3) -> None:
    """Warn the caller of whoever calls this that a name has changed."""
    warnings.warn(f"{former} is now called {name}.", DeprecationWarning, stacklevel=stacklevel)
