"""The reference's transfer runs: ``torchrun --nproc-per-node 8 transfer/main.py …`` (see README.md here)."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a clone without installing
    from mocov3.cli import transfer_main

    sys.exit(transfer_main())
