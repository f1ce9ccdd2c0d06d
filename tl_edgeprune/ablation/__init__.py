"""What a removed edge carries.

Reading order: `reference` (the data), `recording` (one unmasked run), `fixed` (zero, means),
`constants` (learned ones), `kinds`
(each ablation by name).
"""

from tl_edgeprune.ablation.constants import Constants
from tl_edgeprune.ablation.reference import Reference

__all__ = ["Constants", "Reference"]
