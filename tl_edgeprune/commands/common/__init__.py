"""What commands share before anything heavy is imported.

Reading order: `options`, `values` (NAME=VALUE), `inputs` (a model and a task by name), `config`
(--config), `run_folder` (what --out holds), `errors` (messages and exit codes).
"""
