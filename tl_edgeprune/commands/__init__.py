"""The commands of `tl-edgeprune`, one a file. `cli.py` names them.

A command's file has its options; `common/` what commands share, without torch, so that --help is
quick; `jobs/` what a command does once its options are checked.
"""
