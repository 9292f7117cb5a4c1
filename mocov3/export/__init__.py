"""A backbone for other libraries: written, loaded back by them, compared."""
