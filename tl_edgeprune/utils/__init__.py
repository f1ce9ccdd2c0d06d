"""Helpers that know nothing of circuits: files, locks, versions, measurements.

Reading order: `reading` (untrusted files), `writing` (whole files), `tensor_files`, `locks`;
`versions`, `suggest`, `profiling`, `grad_mode`, `dataframe`; `lazy`, the door from a lower layer to
a higher one.
"""
