"""How much of an image's fine structure is left when it is made smaller, by its spectrum."""

import numpy as np
from jaxtyping import Float, UInt8

SIDES = (32, 64, 128, 224)
"""Shorter sides, in pixels, for which that is told."""
_MOST = 128


def kept_detail(pixels: UInt8[np.ndarray, "height width channels"]) -> Float[np.ndarray, "sizes"]:
    """Shares of the energy of an image's edges that are left at a shorter side of each of ``SIDES`` pixels.

    The energy of edges is that of the gradient: the power spectrum times the squared frequency, of a square from the
    middle of the image, faded towards its border. A size keeps the frequencies up to half a cycle for each of its
    pixels. 1 where the image is no larger than the size, and where it is flat.
    """
    short = min(pixels.shape[:2])
    if short <= SIDES[0]:
        return np.ones(len(SIDES))
    side = min(short, _MOST)
    top, left = ((n - side) // 2 for n in pixels.shape[:2])
    grey = pixels[top : top + side, left : left + side].mean(2)
    fade = np.hanning(side + 2)[1:-1]
    power = np.abs(np.fft.rfft2((grey - grey.mean()) * np.outer(fade, fade))) ** 2
    down, across = np.abs(np.fft.fftfreq(side))[:, None], np.fft.rfftfreq(side)
    energy = power * (down**2 + across**2)
    energy[:, 1 : (side + 1) // 2] *= 2  # the other half of the plane
    total = energy.sum()
    if total <= 1e-6:
        return np.ones(len(SIDES))
    largest = np.maximum(down, across)  # resizing cuts along each axis
    kept = [1.0 if size >= short else float(energy[largest <= 0.5 * size / short].sum() / total) for size in SIDES]
    return np.array(kept)
