"""A made-up long run and a wait for its page, for the tests of the page and benchmarks/report.py."""

import time

import numpy as np


def until(page, expression, arg=None, seconds=60):
    """Ask the page again until ``expression`` holds.

    Not ``page.wait_for_function``: where the first answer is no it polls by ``eval`` in the page, which the page's
    Content-Security-Policy forbids.
    """
    end = time.monotonic() + seconds
    while not page.evaluate(expression, arg):
        assert time.monotonic() < end, f"after {seconds} s not yet: {expression}"
        page.wait_for_timeout(50)


def write_long_run(folder, points=50_000, epochs=300):
    """A made-up run of 300 epochs with 50,000 lines."""
    rng = np.random.Generator(np.random.PCG64(0))
    each = points * 10 // epochs
    part = np.arange(points) / points
    a, b, c, d = rng.standard_normal((4, points))
    columns = {
        "loss": 6.6 - 2 * part + 0.05 * a,
        "retrieval_accuracy": 0.5 * part + 0.02 * abs(b),
        "lr": 2.4e-3 * (1 - part),
        "momentum": 0.99 + 0.01 * part,
        "feature_std": 0.9 + 0.01 * c,
        "effective_rank": 100 - 30 * part + d,
        "grad_norm_first": np.exp(0.3 * a),
        "grad_norm_last": np.exp(0.3 * b),
        "images_per_second": 5000 + 50 * c,
        "data_wait": 0.05 + 0.01 * abs(d),
    }
    form = ", ".join(f'"{name}": %.9g' for name in columns)
    same = '"loss_start": 6.65, "loss_floor": 0.3, "skipped": 0, "corrupt": 0, "version": 1'
    with (folder / "metrics.jsonl").open("w") as file:
        for i, values in enumerate(zip(*(column.tolist() for column in columns.values()), strict=True)):
            place = (
                f'"step": {10 * i}, "epoch": {10 * i // each}, "iteration": {10 * i % each}, "resumed": {i // 20000}'
            )
            line = f"{place}, {form % values}, {same}"
            file.write(f'{{{line}, "knn": null}}\n')
            if i % (points // epochs) == 0:
                file.write(f'{{{line}, "knn": {30 + 40 * part[i] + a[i]:.4g}}}\n')
