"""Pictures: the training curve, the static drawing and the interactive page of a circuit."""

from tl_edgeprune.report.circuit_figure import draw_circuit
from tl_edgeprune.report.circuit_html import write_html
from tl_edgeprune.report.history import plot_history

__all__ = ["draw_circuit", "plot_history", "write_html"]
