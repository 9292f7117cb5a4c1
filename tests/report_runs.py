"""A made-up long run, for the tests of the page and benchmarks/report.py."""

import json

import numpy as np


def write_long_run(folder, points=50_000, epochs=300):
    """A made-up run of 300 epochs with 50,000 lines."""
    rng = np.random.Generator(np.random.PCG64(0))
    each = points * 10 // epochs
    noise = rng.standard_normal((points, 4))
    with (folder / "metrics.jsonl").open("w") as file:
        for i in range(points):
            step, part = 10 * i, i / points
            line = {
                "step": step, "epoch": step // each, "iteration": step % each,
                "loss": 6.6 - 2 * part + 0.05 * noise[i, 0], "loss_start": 6.65, "loss_floor": 0.3,
                "retrieval_accuracy": 0.5 * part + 0.02 * abs(noise[i, 1]), "lr": 2.4e-3 * (1 - part),
                "momentum": 0.99 + 0.01 * part, "feature_std": 0.9 + 0.01 * noise[i, 2],
                "effective_rank": 100 - 30 * part + noise[i, 3], "grad_norm_first": float(np.exp(0.3 * noise[i, 0])),
                "grad_norm_last": float(np.exp(0.3 * noise[i, 1])), "images_per_second": 5000 + 50 * noise[i, 2],
                "data_wait": 0.05, "skipped": 0, "resumed": i // 20_000, "corrupt": 0, "knn": None, "version": 1,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
            if i % (points // epochs) == 0:
                file.write(json.dumps({**line, "knn": 30 + 40 * part + noise[i, 0]}) + "\n")
