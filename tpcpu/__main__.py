"""`python -m tpcpu` is the command `tpcpu`."""

import sys

from tpcpu.cli import main

if __name__ == "__main__":
    sys.exit(main())
