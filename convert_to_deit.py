"""The reference's command for conversion: ``python convert_to_deit.py --input CKPT --output FILE``."""

import sys

from mocov3.cli import convert_to_deit

if __name__ == "__main__":
    sys.exit(convert_to_deit())
