"""Discovery methods, one file each; `registry.discover` finds them by name."""
