"""``python -m mocov3``."""

import sys

from mocov3.cli import main

if __name__ == "__main__":
    sys.exit(main())
