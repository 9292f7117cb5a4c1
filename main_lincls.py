"""The reference's command for linear evaluation: ``python main_lincls.py [flags] DIR`` (see ``--help``)."""

import sys

from mocov3.cli import main_lincls

if __name__ == "__main__":
    sys.exit(main_lincls())
