"""A task's pairs through the masked model: what every method and evaluation shares.

Reading order: `task_checks` (do task, model and graph fit?), `targets` (the full model's logits and
the references), `circuit_runs` (many masks over a task), `totals` (sums over all pairs); state on
disk: `checkpoint` (the file), `resume`, `fingerprint` (is it the same run?); `provenance` (what a
result says of its origin), `chance_warning`.
"""
