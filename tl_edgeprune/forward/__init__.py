"""The masked forward pass: x_i = r_i + sum_j z_ij (y_j - ref_j), on the user's own model.

Reading order: `residual` (the split residual stream; memory and speed are decided here), `buffers`,
`forward_pass` (what each hook writes and reads), `masked_model` (hooks on a model), `call_checks`
(what a call may ask for), `context` (`masked`, the public function); `span_masks`, `neuron_gates`,
`half_blocks` and `recompute`; `self_check` (does the model split?), `cost_model` (memory and
operations of a step).
"""

from tl_edgeprune.forward.context import masked
from tl_edgeprune.forward.masked_model import MaskedModel

__all__ = ["MaskedModel", "masked"]
