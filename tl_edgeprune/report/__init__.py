"""Pictures: the training curve, a comparison, a circuit as a drawing and as a page."""

from tl_edgeprune.report.circuit_figure import draw_circuit
from tl_edgeprune.report.circuit_html import write_html
from tl_edgeprune.report.comparison import plot_comparison
from tl_edgeprune.report.history import plot_history

__all__ = ["draw_circuit", "plot_comparison", "plot_history", "write_html"]
