"""Helpers that do not depend on circuits: files, locks, versions, measurements.

Reading order: `reading` (untrusted files), `writing` (whole files), `tensor_files`, `locks`;
`versions`, `suggest`, `renamed`, `profiling`, `grad_mode`, `dataframe`; `lazy` (calls from a lower
layer to a higher one).
"""
