"""Searches that cut edges and measure the objective.

Reading order: `cuts` (what cutting edges does), `full_cuts` (by whole runs: the definition) and
`partial_cuts` with `partial_runs` (from the cut on: the fast way); `edge_effects`; ACDC's searches:
`sequential`, `grouped`, `single_edges`; `elimination` and `polish`, which improve a circuit.
"""
