"""`python -m tl_edgeprune`: the command line."""

from tl_edgeprune.cli import main

if __name__ == "__main__":
    main()
