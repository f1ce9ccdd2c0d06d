"""Silences the libraries' progress bars, advice, prints and deprecation notes while loading."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers and TransformerLens while they load a model.

    This package's own warnings (a damaged cache) and errors still get through.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_no_bars())
        stack.enter_context(_no_logging())
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for module in ("transformers", "transformer_lens", "torch", "huggingface_hub"):
            warnings.filterwarnings("ignore", module=module)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    were_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_enabled:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _no_logging() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(level)
