"""Discovery methods, one file each. `registry.discover` finds them by name.

A method's file has its definition, its paper and what it needs; the machinery is in `attribution`,
`training` and `search`.
"""
