"""Linear evaluation (arXiv 2104.02057, §4): many heads in one pass over frozen features."""
