"""Pictures: a circuit as a page, a drawing and DOT text, and plots of measurements.

`circuit/` has the first three, `plots/` one file per plot, and `figures` and `palette` what they
share. `page/` has the page's HTML, CSS and JavaScript. Each function is imported on first use: a
page needs no matplotlib, a drawing no TransformerLens.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "draw_circuit": "circuit.figure",
    "plot_comparison": "plots.comparison",
    "plot_faithfulness": "plots.faithfulness",
    "plot_heads": "plots.heads",
    "plot_history": "plots.history",
    "plot_stability": "plots.stability",
    "to_dot": "circuit.dot",
    "write_html": "circuit.html_page",
}
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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
