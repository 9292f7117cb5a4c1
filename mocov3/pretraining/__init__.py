"""Pre-training by MoCo v3 (arXiv 2104.02057, algorithm 1): from inputs to the loop, and what runs beside it."""
