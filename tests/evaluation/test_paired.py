"""Answers of two networks on the same images: bounds of the drop, verdicts, conclusions."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar

from mocov3.evaluation.neighbours import right_among, shared_neighbours
from mocov3.evaluation.paired import Paired, against_start, conclude, kept, old_verdict, smallest_set

Z = 1.6448536


def by_search(lost, gained, images):
    """The bound, by searching for the likeliest multinomial under each drop (Tango 1998, without his closed form)."""

    def score(drop):
        def against(gain):
            same = images - lost - gained
            return -(lost * np.log(gain + drop) + gained * np.log(gain) + same * np.log(1 - 2 * gain - drop))

        ends = max(0, -drop) + 1e-9, (1 - drop) / 2 - 1e-9
        gain = minimize_scalar(against, bounds=ends, method="bounded", options={"xatol": 1e-13}).x
        return (lost - gained - images * drop) / np.sqrt(images * (2 * gain + drop * (1 - drop))) + Z

    return 100 * brentq(score, (lost - gained) / images + 1e-6, 0.9)


@pytest.mark.parametrize(("lost", "gained", "images"), [(5, 3, 50), (12, 4, 200), (3, 30, 300), (40, 40, 700)])
def test_bounds_are_those_of_the_score_test(lost, gained, images):
    pair = Paired(images, images // 2, lost, gained)
    assert pair.most == pytest.approx(by_search(lost, gained, images), abs=1e-4)
    assert pair.least == pytest.approx(-by_search(gained, lost, images), abs=1e-4)
    assert pair.least < pair.drop < pair.most


def test_no_change_is_not_certainty():
    for images in (10, 100, 1000):
        pair = Paired(images, images // 2, 0, 0)
        assert pair.most == pytest.approx(100 * Z**2 / (images + Z**2), rel=1e-6)
        assert pair.least == -pair.most


@pytest.mark.parametrize(("images", "lost", "gained"), [(100, 0.05, 0.05), (700, 0.06, 0.04), (200, 0.1, 0.01)])
def test_bounds_hold_as_often_as_they_say(images, lost, gained):
    drawn = np.random.Generator(np.random.PCG64(0)).multinomial(images, [lost, gained, 1 - lost - gained], size=1500)
    most = np.array([Paired(images, images, int(a), int(b)).most for a, b, _ in drawn])
    held = (most >= 100 * (lost - gained)).mean()
    assert 0.93 <= held <= 0.975, "95 %, four standard errors of 1,500 draws and a point of approximation"


def test_the_smallest_set_is_about_700_images():
    n = smallest_set(2)
    assert 650 <= n <= 700
    assert Paired(n, n, n // 20, n // 20).most == pytest.approx(2, abs=0.03)
    assert smallest_set(2, changed=0.2) == pytest.approx(2 * n, abs=2)


@pytest.mark.parametrize(
    ("pair", "verdict", "goes_on"),
    [
        (Paired(1000, 800, 30, 30), "not damaged", True),
        (Paired(1000, 800, 10, 60), "not damaged", True),
        (Paired(1000, 800, 60, 45), "cannot tell", False),  # neither shown nor ruled out
        (Paired(1000, 800, 90, 30), "damaged", False),
        (Paired(1000, 800, 14, 2), "not damaged", True),  # shown, but of less than 2 points
        (Paired(200, 160, 0, 0), "cannot tell", True),  # too few for any but a large drop
        (Paired(200, 160, 8, 6), "cannot tell", True),
        (Paired(200, 160, 90, 3), "damaged", False),
    ],
)
def test_verdicts_on_the_old_kind(pair, verdict, goes_on):
    assert (old_verdict(pair, 2), kept(pair, 2)) == (verdict, goes_on)


FINE, HURT, FEW = Paired(1000, 800, 30, 30), Paired(1000, 800, 90, 30), Paired(200, 160, 8, 6)
BETTER, SAME = Paired(500, 300, 20, 70), Paired(500, 300, 20, 24)


@pytest.mark.parametrize(
    ("old", "new", "last", "keep"),
    [
        (FINE, None, "only labels can tell", False),
        (FEW, None, "only labels can tell", False),
        (HURT, None, "Keep your weights", True),
        (HURT, BETTER, "Keep your weights", True),
        (FINE, BETTER, "Use best.", False),
        (FINE, SAME, "Keep your weights", True),
        (FEW, BETTER, "for the new kind only: whether it still serves the old cannot be told", False),
        (None, BETTER, "was not asked (--guard)", False),
        (None, SAME, "Keep your weights", True),
    ],
)
def test_conclusions(old, new, last, keep):
    conclusion = conclude("best", old, new, 2)
    assert (last in conclusion.sentences[-1], conclusion.keep_yours) == (True, keep)
    if new is None:  # without labels of the new kind nothing is called better
        assert not any(
            "better" in s.replace("is better on the new kind, only labels", "") for s in conclusion.sentences
        )
    if old is FEW:
        assert "images would do to rule out 2 points" in conclusion.sentences[0]


def test_counts_come_from_answers():
    before = torch.tensor([True, True, True, False, False])
    after = torch.tensor([True, False, False, True, False])
    pair = Paired.of(before, after)
    assert pair == Paired(5, 3, 2, 1) == Paired.from_dict(pair.as_dict())
    assert (pair.before, pair.after, pair.drop) == pytest.approx((60, 40, 20))


def test_answers_and_neighbours_of_features():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long()
    right = right_among(x, labels)
    for i in (0, 17, 42):
        cosine = torch.nn.functional.cosine_similarity(x, x[i : i + 1])
        cosine[i] = -2
        best = cosine.topk(20)
        votes = torch.zeros(2).index_add_(0, labels[best.indices], (best.values / 0.07).exp())
        assert bool(votes.argmax() == labels[i]) == bool(right[i])
    assert shared_neighbours(x, 3 * x) == 100
    other = torch.randn(60, 7, generator=torch.Generator().manual_seed(1))
    assert shared_neighbours(x, other) == pytest.approx(100 * 14 / 59, abs=6), "chance"
    assert np.isnan(shared_neighbours(x, other / 0))


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((2.41, 5.63), "between 2.4 and 5.6 points lost"),
        ((-5.63, -2.41), "between 2.4 and 5.6 points gained"),
        ((-1.13, 0.42), "between 1.1 points gained and 0.4 lost"),
    ],
)
def test_bounds_read_as_a_range(bounds, words):
    """The smaller number first, and a gain never as a loss."""
    assert words in against_start("net", Paired(1000, 600, 30, 30, bounds))
