"""Rates of rows that come in groups: how often the interval holds the truth, and its extremes."""

import pytest
import torch

from probes.clustered import clustered_wilson
from probes.scores import wilson


def rows_of(shares: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(len(shares), rows, generator=generator) < shares[:, None]).flatten()


@pytest.mark.parametrize(("groups", "rows"), [(3, 8), (4, 8), (4, 32), (10, 2), (20, 4)])
def test_few_groups_are_covered_as_often_as_is_said(groups: int, rows: int) -> None:
    """Groups whose own rates are drawn from Beta(2, 2): the median of three uniform numbers."""
    generator = torch.Generator().manual_seed(groups * rows)
    names = [str(i) for i in range(groups) for _ in range(rows)]
    inside, draws = 0, 500
    for _ in range(draws):
        shares = torch.rand(groups, 3, generator=generator).median(1).values
        found = clustered_wilson(rows_of(shares, rows, generator), names)
        inside += found.low <= 0.5 <= found.high
    assert inside / draws >= 0.93


def test_many_groups_are_not_covered_too_often() -> None:
    generator = torch.Generator().manual_seed(5)
    names = [str(i) for i in range(40) for _ in range(8)]
    inside = 0
    for _ in range(500):
        shares = torch.rand(40, 3, generator=generator).median(1).values
        found = clustered_wilson(rows_of(shares, 8, generator), names)
        inside += found.low <= 0.5 <= found.high
    assert 0.92 <= inside / 500 <= 0.98


def test_one_group_is_as_good_as_one_row() -> None:
    """How much groups differ cannot be seen in one: any number of its rows says no more."""
    hits = torch.tensor([True, False] * 50)
    found = clustered_wilson(hits, ["a"] * 100)
    z = 1.959963984540054
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - z / 2 / (1 + z * z) ** 0.5)
    assert found.high == pytest.approx(1 - found.low)
    assert clustered_wilson(hits[:2], ["a"] * 2).low == pytest.approx(found.low)
    assert clustered_wilson(hits[::2], ["a"] * 50) == wilson(1, 1)


def test_the_quantile_is_students() -> None:
    """Two groups alike and as many rows as are independent: Wilson's formula with t of 1 degree."""
    from scipy.stats import t

    hits = torch.tensor([True, False] * 4)
    found = clustered_wilson(hits, list("aabbaabb"))
    q, n = float(t.ppf(0.975, 1)), 8
    half = q / (1 + q * q / n) * (0.25 / n + q * q / (4 * n * n)) ** 0.5
    assert found.low == pytest.approx(0.5 - half) and found.high == pytest.approx(0.5 + half)
