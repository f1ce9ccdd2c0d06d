"""Where a TransformerLens model is hooked. Only this package knows TransformerLens' classes.

Reading order: `sites` (a model's hook points and weights; how heads read and write), `projections`
and `norms` (how that is computed), `find` (how sites are found in either class), `unsupported`
(what is refused, and why), `attach` (hooks on and off), `unused_work` (what masked runs skip);
`modules`, `placement`, `shards`, `prompt_checks`.
"""

from tl_edgeprune.hooks.find import find_sites

__all__ = ["find_sites"]
