"""Correlations and similarities, exact over a stream of images; all sums in float64 on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kendall_tau(first: Tensor, second: Tensor) -> float:
    """Kendall's tau-b of two (n,) score lists, -1..1; NaN where one of them is constant.

    Of all pairs, those in equal order less those in opposite order; ties count in neither and
    shrink the divisor. Takes n * n memory.
    """
    order = torch.sign(first[:, None] - first[None]).double()
    other = torch.sign(second[:, None] - second[None]).double()
    untied = order.abs().sum() * other.abs().sum()
    return float((order * other).sum() / untied.sqrt()) if untied > 0 else math.nan


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1..n of (n,) values, float64; equal values share the mean of their ranks."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = count.cumsum(0).double() - (count.double() - 1) / 2
    return ranks[place]


def pearson(first: Tensor, second: Tensor) -> float:
    """Linear correlation of two (n,) lists, -1..1; NaN where one of them is constant."""
    moments = Moments()
    moments.add(first, second)
    return moments.correlation()


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two (n,) lists, -1..1; NaN where one of them is constant."""
    return pearson(average_ranks(first), average_ranks(second))


def overlap_at_top(first: Tensor, second: Tensor, share: float) -> float:
    """Of the places where `first` is greatest, the share where `second` is among its greatest, too.

    Both are (n,); the greatest `share` of the places counts, at least one, and chance gives about
    `share`. Of equal values the earlier ones go first.
    """
    count = max(1, round(share * len(first)))
    tops = [values.sort(descending=True, stable=True)[1][:count] for values in (first, second)]
    return float(torch.isin(*tops).double().mean()) if len(first) else math.nan


class Moments:
    """Means, variances and the covariance of two quantities, batch by batch (Chan et al., 1979)."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.count = 0
        self.means = torch.zeros(2, dtype=torch.float64)
        self.scatter = torch.zeros(2, 2, dtype=torch.float64)

    def add(self, first: Tensor, second: Tensor) -> None:
        """Two (n,) lists of values."""
        values = torch.stack((first, second)).double().cpu()
        count = values.shape[1]
        if not count:
            return
        means = values.mean(1)
        centred = values - means[:, None]
        total, shift = self.count + count, means - self.means
        self.scatter += centred @ centred.T + shift.outer(shift) * (self.count * count / total)
        self.means += shift * (count / total)
        self.count = total

    def correlation(self) -> float:
        """Pearson's, -1..1; NaN where a quantity is constant or nothing was seen."""
        deviations = self.scatter.diagonal().sqrt()
        # A constant leaves rounding behind, not exactly 0.
        if (deviations <= 1e-12 * self.means.abs()).any():
            return math.nan
        value = float(self.scatter[0, 1] / deviations.prod())
        return max(-1.0, min(1.0, value))


class LinearCKA:
    """Linear centred kernel alignment of two sets of features, batch by batch.

    Kornblith et al., arXiv 1905.00414, section 3, with the unbiased estimate of the Hilbert-Schmidt
    criterion (Song et al., 2012, eq. 5) in place of the biased one: with fewer positions than
    channels the biased one comes out near 1 for features that have nothing in common. Sums over
    positions suffice for it, so no position is kept. 1: equal up to rotation, scale and offset;
    about 0: nothing in common.
    """

    def __init__(self) -> None:
        """Widths are those of the first batch."""
        self.count = 0
        self._sums: dict[str, Tensor] = {}
        self._origins: tuple[Tensor, Tensor] | None = None

    def add(self, first: Tensor, second: Tensor) -> None:
        """(n, C1) and (n, C2): the features of the same n positions, n at least 1."""
        x, y = first.double().cpu(), second.double().cpu()
        if self._origins is None:
            # No offset changes the result, but a large common one would cost it its digits.
            self._origins = x.mean(0), y.mean(0)
        x, y = x - self._origins[0], y - self._origins[1]
        k, m = x.square().sum(1), y.square().sum(1)  # the diagonals of both kernels
        new = {"x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "yy": y.T @ y, "xy": x.T @ y}
        new |= {"k": k.sum(), "m": m.sum(), "kk": k @ k, "mm": m @ m, "km": k @ m}
        new |= {"kx": k @ x, "ky": k @ y, "mx": m @ x, "my": m @ y}
        self._sums = {name: value + self._sums.get(name, 0) for name, value in new.items()}
        self.count += len(x)

    def value(self) -> float:
        """-1..1, below 0 only by chance; NaN below four positions or where one side is constant."""
        if self.count < 4:
            return math.nan
        x, y = self._criterion("x", "x", "k", "k"), self._criterion("y", "y", "m", "m")
        sums = self._sums
        if x <= 1e-12 * float(sums["kk"]) or y <= 1e-12 * float(sums["mm"]):
            return math.nan
        return self._criterion("x", "y", "k", "m") / math.sqrt(x * y)

    def _criterion(self, a: str, b: str, k: str, m: str) -> float:
        """The unbiased criterion of the kernels of a and b, diagonals k and m, times n (n - 3)."""
        s, n = self._sums, self.count
        trace = s[a + b].square().sum() - s[k + m]
        totals = (s[a] @ s[a] - s[k]) * (s[b] @ s[b] - s[m])
        rows = s[a] @ s[a + b] @ s[b] - s[m + a] @ s[a] - s[k + b] @ s[b] + s[k + m]
        return float(trace + totals / ((n - 1) * (n - 2)) - 2 * rows / (n - 2))
