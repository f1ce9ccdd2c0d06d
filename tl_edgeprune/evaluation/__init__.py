"""How good a circuit is.

Reading order: `evaluate` with its `measures`; `faithfulness` (MIB's CPR and CMD), `roc` and
`ground_truth` (known circuits), `knockouts` (completeness, minimality), `hypothesis_tests` with
`statistics`, `stability`; `compare` with `comparison` and `comparison_folder`; `explain/` (what
each edge does).
"""
