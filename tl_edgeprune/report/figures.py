"""Matplotlib figures that do not change the caller's pyplot state or style."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from cycler import cycler
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tl_edgeprune.report.palette import FAINT, INK, MUTED, SERIES
from tl_edgeprune.utils.writing import write_whole

FORMATS = ("png", "svg", "pdf")

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=SERIES),
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is not mathematics
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.hashsalt": "tl_edgeprune",  # the same circuit gives the same file
    "svg.fonttype": "none",
}


@contextmanager
def saved_figure(
    path: str | os.PathLike[str], width: float, height: float, dpi: int = 200
) -> Iterator[Figure]:
    """A figure of `width` by `height` inches in the package's style, saved when the block ends.

    pyplot is never imported: no window, current figure or backend changes.

    Raises:
        ValueError: the path does not end in one of FORMATS.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise ValueError(
            f"cannot draw {os.fspath(path)!r}: its ending must be one of "
            f"{', '.join('.' + name for name in FORMATS)}."
        )
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
        image = BytesIO()
        figure.savefig(image, format=suffix, metadata=metadata[suffix])
    write_whole(path, image.getvalue())
