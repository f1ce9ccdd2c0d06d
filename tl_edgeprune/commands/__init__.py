"""The commands of `tl-edgeprune`, one a file. `cli.py` names them."""
