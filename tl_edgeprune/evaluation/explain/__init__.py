"""What each edge of a circuit does.

Reading order: `explain` (the function), `explanation` (its result), `logit_lens` (direct effects),
`position_means` (attention by position).
"""
