"""Plots of what was measured, one a file; `axes` and `series` are what they share."""
