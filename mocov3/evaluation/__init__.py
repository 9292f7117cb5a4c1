"""Evaluating frozen features: linear evaluation, k-NN, embedding, quality without labels, networks side by side."""
