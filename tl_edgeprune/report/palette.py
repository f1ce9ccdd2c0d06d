"""Colour-blind-safe colours, and markers that show the same without colour."""

from __future__ import annotations

# Okabe and Ito's palette ("Color Universal Design", 2008), without its yellow.
BLUE, VERMILLION, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, BLACK, BROWN = "#e69f00", "#56b4e9", "#000000", "#8c6d31"
SERIES = (BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, BLACK, BROWN)  # of lines in one plot

INK, MUTED, FAINT = "#1b2330", "#667085", "#e3e7ee"
KIND_COLORS = {  # a graph has heads with either one input or q, k and v, never both
    "q": BLUE,
    "k": VERMILLION,
    "v": GREEN,
    "attn": BLUE,
    "mlp": PINK,
    "logits": "#3d4656",
}
KIND_MARKERS = {"q": "o", "k": "s", "v": "^", "attn": "o", "mlp": "D", "logits": "_"}
SIDE_COLORS = {"shared": "#3d4656", "a": BLUE, "b": VERMILLION}  # of two overlaid circuits
