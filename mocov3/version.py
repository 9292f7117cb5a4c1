"""The version of mocov3, readable without importing anything else."""

__version__ = "0.1.0"
