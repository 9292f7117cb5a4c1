"""The reference's command for pre-training: ``python main_moco.py [flags] DIR`` (see ``--help``)."""

import sys

from mocov3.cli import main_moco

if __name__ == "__main__":
    sys.exit(main_moco())
