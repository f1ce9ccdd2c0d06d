"""Scores from the mask's gradient, shared by the methods.

Reading order: `paths` (where the gradient is taken), `mask_gradient` (the gradient of every edge's
mask, summed over a task), `output_gram`.
"""
