"""`python -m tl_edgeprune`: the command line."""

import sys

from tl_edgeprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
