"""`python -m pixelgen` is the `pixelgen` command, also for torchrun."""

import sys

from pixelgen.cli import main

if __name__ == "__main__":
    sys.exit(main())
