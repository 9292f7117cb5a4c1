"""Images that take long, and views that tell when they were made. Loader processes import this: it is light."""

import time

import numpy as np


class Slow:
    """Images of which some take long; a view holds when it was ready."""

    labels, digest = None, ""

    def __init__(self, count, slow, seconds):
        self.classes = []
        self.count, self.slow, self.seconds = count, slow, seconds

    def __len__(self):
        return self.count

    def name(self, index):
        return str(index)

    def read(self, index):
        if index in self.slow:
            time.sleep(self.seconds)
        return np.full((4, 4, 3), index, np.uint8)


class Stamp:
    """Views that hold the time."""

    count, image_size = 1, 4

    def __call__(self, data, *, seed, epoch, index, out=None):
        out[0].reshape(-1)[:8] = np.frombuffer(np.float64(time.monotonic()).tobytes(), np.uint8)


class Failing(Stamp):
    """A transform with a mistake."""

    def __call__(self, *args, **more):
        raise ZeroDivisionError("on purpose")
