"""Pictures: a circuit as a page, as a drawing and as DOT text, and plots of what was measured.

Each is imported on first use: a page needs no matplotlib, a drawing no TransformerLens.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_edgeprune.report.circuit.dot import to_dot
    from tl_edgeprune.report.circuit.figure import draw_circuit
    from tl_edgeprune.report.circuit.html_page import write_html
    from tl_edgeprune.report.plots.comparison import plot_comparison
    from tl_edgeprune.report.plots.faithfulness import plot_faithfulness
    from tl_edgeprune.report.plots.heads import plot_heads
    from tl_edgeprune.report.plots.history import plot_history
    from tl_edgeprune.report.plots.stability import plot_stability

__all__ = [
    "draw_circuit",
    "plot_comparison",
    "plot_faithfulness",
    "plot_heads",
    "plot_history",
    "plot_stability",
    "to_dot",
    "write_html",
]
_FILES = {"draw_circuit": "circuit_figure", "write_html": "circuit_html", "to_dot": "dot"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file = _FILES.get(name, name.removeprefix("plot_"))
    return getattr(import_module(f"{__name__}.{file}"), name)
