"""The functions of the package, as type checkers see them."""

from tl_edgeprune.report.circuit.dot import to_dot as to_dot
from tl_edgeprune.report.circuit.figure import draw_circuit as draw_circuit
from tl_edgeprune.report.circuit.html_page import write_html as write_html
from tl_edgeprune.report.plots.comparison import plot_comparison as plot_comparison
from tl_edgeprune.report.plots.faithfulness import plot_faithfulness as plot_faithfulness
from tl_edgeprune.report.plots.heads import plot_heads as plot_heads
from tl_edgeprune.report.plots.history import plot_history as plot_history
from tl_edgeprune.report.plots.stability import plot_stability as plot_stability
