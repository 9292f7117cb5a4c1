"""Measurements, printed by commands of the Makefile; nothing here is imported by the package."""
