"""How much of the edges smaller sizes keep: closed forms."""

import numpy as np
import pytest

from mocov3.data.sources.detail import SIDES, kept_detail


def waves(side, *cycles):
    """Waves of so many cycles an image, along the width, as RGB."""
    x = np.arange(side) / side
    grey = 128 + 40 * sum(np.sin(2 * np.pi * n * x) for n in cycles)
    return np.broadcast_to(grey[None, :, None], (side, side, 3)).round().astype(np.uint8)


@pytest.mark.parametrize(("cycles", "kept"), [(8, (1, 1, 1, 1)), (24, (0, 1, 1, 1)), (96, (0, 0, 0, 1))])
def test_a_wave_is_kept_by_sizes_of_two_pixels_a_cycle(cycles, kept):
    np.testing.assert_allclose(kept_detail(waves(256, cycles)), kept, atol=0.03)


def test_energy_of_edges_is_power_times_squared_frequency():
    # two waves as strong as each other: the gradient of the second is five times as steep
    expected = 8**2 / (8**2 + 40**2)
    np.testing.assert_allclose(kept_detail(waves(256, 8, 40)), (expected, expected, 1, 1), atol=0.02)


def test_the_size_counts_for_the_whole_image_not_the_middle_that_is_looked_at():
    large = waves(1024, 56)  # 56 cycles an image need 112 px
    np.testing.assert_allclose(kept_detail(large), (0, 0, 1, 1), atol=0.03)


def test_small_and_flat_images_lose_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (28, 40, 3), dtype=np.uint8)
    np.testing.assert_array_equal(kept_detail(noise), np.ones(len(SIDES)))
    np.testing.assert_array_equal(kept_detail(np.full((300, 300, 1), 7, np.uint8)), np.ones(len(SIDES)))


def test_white_noise_keeps_the_share_of_its_frequencies():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 1), dtype=np.uint8)
    shares = (np.array(SIDES) / 256) ** 4  # area times mean squared frequency
    np.testing.assert_allclose(kept_detail(noise), shares, rtol=0.1, atol=2e-4)
