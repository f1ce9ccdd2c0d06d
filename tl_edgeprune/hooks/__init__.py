"""Where a TransformerLens model is hooked. Only this package knows TransformerLens' classes.

Reading order: `sites` (a model's hook points and weights), `find` (how they are found in either
class), `unsupported` (what is refused, and why), `attach` (hooks on and off), `projections` and
`norms` (how heads are read), `unused_work`; `modules`, `placement`, `shards`, `prompt_checks`.
"""

from tl_edgeprune.hooks.find import find_sites

__all__ = ["find_sites"]
