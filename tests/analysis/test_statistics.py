"""Correlations and similarities against values worked by hand and against their definitions."""

import math

import pytest
import torch

from detdistill.analysis.statistics import (
    LinearCKA,
    Moments,
    average_ranks,
    kendall_tau,
    overlap_at_top,
    pearson,
    spearman,
)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ((1, 2, 3), (4, 5, 6), 1),
        ((1, 2, 3), (6, 5, 4), -1),
        ((1, 2, 3), (1, 3, 2), 1 / 3),  # pairs: two agree, one does not
        ((1, 2, 3, 4), (2, 1, 4, 3), 1 / 3),  # four of six agree, two do not
        ((1, 1, 2), (1, 2, 3), 2 / math.sqrt(2 * 3)),  # one pair of the first is tied
        ((1, 1, 2), (1, 1, 3), 1),
    ],
)
def test_kendall_tau(first, second, tau):
    assert kendall_tau(numbers(*first), numbers(*second)) == pytest.approx(tau)


@pytest.mark.parametrize("statistic", [kendall_tau, pearson, spearman])
def test_a_constant_correlates_with_nothing(statistic):
    assert math.isnan(statistic(numbers(1, 1, 1), numbers(1, 2, 3)))
    assert math.isnan(statistic(numbers(0.1, 0.1, 0.1), numbers(0.1, 0.1, 0.1)))
    assert math.isnan(statistic(numbers(5), numbers(2)))


def test_ranks_share_their_mean():
    assert average_ranks(numbers(30, 10, 20)).tolist() == [3, 1, 2]
    assert average_ranks(numbers(5, 7, 5, 9)).tolist() == [1.5, 3, 1.5, 4]
    assert average_ranks(numbers()).tolist() == []


def test_spearman_sees_order_only():
    assert spearman(numbers(1, 2, 3, 4), numbers(1, 10, 100, 1000)) == pytest.approx(1)
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    assert spearman(numbers(1, 2, 3, 4), numbers(20, 10, 40, 30)) == pytest.approx(0.6)


def test_pearson_by_hand():
    # Deviations -1 0 1 and -1 1 0: 1 / sqrt(2 * 2)
    assert pearson(numbers(1, 2, 3), numbers(4, 6, 5)) == pytest.approx(0.5)


def test_moments_do_not_depend_on_the_batches():
    torch.manual_seed(0)
    first = 1000 + torch.randn(60)
    second = first * 0.3 + torch.randn(60)
    whole, parts = Moments(), Moments()
    whole.add(first, second)
    for piece in (slice(0, 0), slice(0, 1), slice(1, 40), slice(40, 60)):
        parts.add(first[piece], second[piece])
    assert parts.count == 60
    assert parts.correlation() == pytest.approx(whole.correlation(), abs=1e-12)
    expected = torch.corrcoef(torch.stack((first, second)).double())[0, 1]
    assert whole.correlation() == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize(
    ("second", "share", "overlap"),
    [
        ((9, 8, 1, 1), 0.5, 1),
        ((1, 9, 8, 1), 0.5, 0.5),
        ((1, 1, 9, 8), 0.5, 0),
        ((9, 1, 1, 1), 0.1, 1),
    ],
)
def test_overlap_at_the_top(second, share, overlap):
    assert overlap_at_top(numbers(4, 3, 2, 1), numbers(*second), share) == overlap


def cka(first, second, batches=1):
    meter = LinearCKA()
    for x, y in zip(first.chunk(batches), second.chunk(batches), strict=True):
        meter.add(x, y)
    return meter.value()


def unbiased_criterion(k, m):
    """Song et al., eq. 5, as it stands there."""
    n = len(k)
    k, m = k - k.diag().diag(), m - m.diag().diag()
    one = torch.ones(n, dtype=torch.float64)
    total = (k @ m).trace() + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return total - 2 / (n - 2) * (one @ k @ m @ one)


def test_cka_is_its_definition():
    torch.manual_seed(0)
    x = torch.randn(12, 3).double() + 5
    y = x @ torch.randn(3, 4).double() + torch.randn(12, 4)
    k, m = x @ x.T, y @ y.T
    expected = unbiased_criterion(k, m) / torch.sqrt(
        unbiased_criterion(k, k) * unbiased_criterion(m, m)
    )
    assert cka(x, y) == pytest.approx(expected.item(), abs=1e-9)
    assert cka(x, y, batches=5) == pytest.approx(expected.item(), abs=1e-9)


def test_cka_of_four_positions_by_hand():
    """Kernels without diagonals, centred so that every row sums to 0, are compared entry by entry.

    x = (0, 0, 1, 1): its only similar pair is the last; so is y's, scaled. z pairs 2 and 4.
    """
    x = numbers(0, 0, 1, 1)[:, None]
    assert cka(x, 3 * x + 7) == pytest.approx(1)
    # Of 6 pairs, {12, 34} share one centred value and the other four minus half of it.
    z = numbers(0, 1, 0, 1)[:, None]
    assert cka(x, z) == pytest.approx(-0.5)


def test_cka_ignores_rotation_scale_and_offset():
    torch.manual_seed(1)
    x = torch.randn(50, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    assert cka(x, -4 * x @ rotation + 1000) == pytest.approx(1, abs=1e-4)


def test_cka_of_strangers_is_small_even_in_few_positions():
    torch.manual_seed(2)
    assert abs(cka(torch.randn(40, 256), torch.randn(40, 128))) < 0.1


def test_cka_needs_four_positions_that_differ():
    assert math.isnan(cka(torch.randn(3, 2), torch.randn(3, 2)))
    assert math.isnan(cka(torch.ones(9, 2), torch.randn(9, 2)))
    assert math.isnan(LinearCKA().value())
