"""`python -m penstock.runtime.mover`: started by the keeper, never by hand."""

import sys

from penstock.runtime.mover.process import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
