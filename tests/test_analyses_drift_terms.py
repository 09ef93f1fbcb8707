"""The ledger's terms: exact zeros, planted changes, nulls against direct simulation."""

import math

import pytest
import scipy.spatial.distance
import scipy.stats
import torch

from analyses.drift import halves, terms


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights_of(U: list[torch.Tensor], V: list[torch.Tensor]) -> terms.Term:
    rows = list(zip(U, V, strict=True))
    return terms.weight_term(
        torch.stack([(u * v).sum() for u, v in rows]),
        torch.stack([u.square().sum() for u in U]),
        torch.stack([v.square().sum() for v in V]),
        torch.tensor([u.numel() for u in U]),
        count=200,
        seed=0,
    )


def matrices(seed: int, rank: int | None = None, shape: tuple[int, int] = (30, 20)) -> list:
    drawn = generator(seed)
    return [
        torch.randn(shape[0], rank or shape[1], generator=drawn)
        @ torch.randn(rank or shape[1], shape[1], generator=drawn)
        for _ in range(8)
    ]


@pytest.mark.parametrize("rank", [1, 4, None])
def test_the_weight_null_is_that_of_random_updates_of_any_rank(rank: int | None) -> None:
    """95 % of random updates lie inside 1; an update along the alignment lies far outside."""
    V = matrices(0, rank=2)
    values = [weights_of(matrices(seed, rank), V).value for seed in range(1, 400)]
    inside = sum(v <= 1 for v in values)
    assert 0.91 <= inside / len(values) <= 0.985
    along = weights_of([0.3 * v for v in V], V)
    assert along.statistic == pytest.approx(1.0) and along.value > 5 and along.low > 1


def test_the_weight_term_knows_the_sign_and_no_scale() -> None:
    V, U = matrices(0), matrices(1)
    back = weights_of([-v for v in V], V)
    assert back.statistic == pytest.approx(-1.0)
    assert back.value == pytest.approx(weights_of(V, V).value)
    assert weights_of([7 * u for u in U], V).value == pytest.approx(weights_of(U, V).value)


def test_tensors_that_alignment_left_alone_do_not_count() -> None:
    V, U = matrices(0), matrices(1)
    zero = torch.zeros_like(V[0])
    more = weights_of([*U, 100 * V[0]], [*V, zero])
    assert more.value == pytest.approx(weights_of(U, V).value)
    with pytest.raises(ValueError, match="base and aligned have equal weights"):
        weights_of(U[:1], [zero])


def test_no_update_is_exactly_no_drift() -> None:
    V = matrices(0)
    none = weights_of([torch.zeros_like(v) for v in V], V)
    assert (none.value, none.low, none.high, none.statistic) == (0.0, 0.0, 0.0, 0.0)


def prompts(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Twins: classes and topics of 2n prompts."""
    return torch.tensor([True, False] * n), torch.arange(n).repeat_interleave(2)


def test_the_representation_term_finds_a_planted_loss_of_contrast() -> None:
    """Halving the distance between the classes is beyond the null; noise of the same size is not."""
    positive, groups = prompts(60)
    drawn = generator()
    along = torch.randn(3, 120, generator=drawn) + 2.0 * positive.float()
    null = halves.representation_null(
        halves.project(along, positive, groups), terms.halves(torch.full((60,), 3), seed=0)
    )
    lost = torch.where(positive, -1.0, 0.0).expand(3, -1)
    noise = 1.0 * torch.randn(3, 120, generator=drawn)
    options = {"count": 300, "seed": 0}
    planted = halves.representation_term(halves.project(lost, positive, groups), null, **options)
    control = halves.representation_term(halves.project(noise, positive, groups), null, **options)
    same = halves.representation_term(halves.project(0 * noise, positive, groups), null, **options)
    assert planted.low > 1 and control.low < 1
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_the_representation_null_is_that_of_two_halves() -> None:
    positive, groups = prompts(30)
    along = torch.randn(2, 60, generator=generator())
    split = terms.halves(torch.full((30,), 3), seed=3)
    assert bool((split.sum(1) == 15).all())
    found = halves.representation_null(halves.project(along, positive, groups), split)
    gaps = []
    for half in split:
        row = []
        for layer in along.double():
            pairs = layer.view(30, 2)
            row.append(
                float((pairs[half, 0] - pairs[half, 1]).mean())
                - float((pairs[~half, 0] - pairs[~half, 1]).mean())
            )
        gaps.append(row)
    cells = torch.tensor(gaps).abs().double().quantile(0.95, 0)
    torch.testing.assert_close(found.cells, cells)


def logits(n: int, drawn: torch.Generator) -> torch.Tensor:
    return (2 * torch.randn(n, 3, 40, generator=drawn)).log_softmax(-1)


def moved(ours: torch.Tensor, theirs: torch.Tensor | None, reached: torch.Tensor) -> halves.Moves:
    positive, groups = prompts(len(ours) // 2)
    change = ours.exp() if theirs is None else theirs.exp() - ours.exp()
    return halves.moves(lambda rows, step: change[rows, step], reached, positive, groups)


def token(ours: torch.Tensor, theirs: torch.Tensor, reached: torch.Tensor) -> terms.Term:
    null = halves.token_null(
        moved(ours, None, reached), terms.halves(torch.full((len(ours) // 2,), 3), seed=0)
    )
    return halves.token_term(moved(ours, theirs, reached), null, count=200, seed=0)


def test_the_token_distance_is_that_of_the_means() -> None:
    drawn = generator(3)
    ours, theirs = logits(20, drawn), logits(20, drawn)
    reached = torch.ones(20, 3, dtype=torch.bool)
    reached[4, 2] = reached[7, 1] = reached[7, 2] = False
    null = halves.Null(torch.ones(6, dtype=torch.float64), 1.0)
    found = halves.token_term(moved(ours, theirs, reached), null, count=200, seed=0)
    squares = []
    for kind in (0, 1):  # positive prompts stand first in each pair
        for step in range(3):
            rows = [i for i in range(kind, 20, 2) if reached[i, step]]
            means = [x[rows, step].double().exp().mean(0).numpy() for x in (ours, theirs)]
            squares.append(scipy.spatial.distance.sqeuclidean(*means))
    want = math.sqrt(sum(squares) / len(squares))
    assert found.statistic == pytest.approx(want)
    assert found.value < want  # less what noise adds


def test_no_cell_counts_for_more_than_one_prompt_of_a_half_explains() -> None:
    ours = torch.full((40, 1, 5), -100.0)
    ours[:, :, 0] = 0.0  # every answer begins with the same token, for certain
    null = halves.token_null(
        moved(ours, None, torch.ones(40, 1, dtype=torch.bool)),
        terms.halves(torch.full((20,), 3), seed=0),
    )
    assert null.cells.tolist() == pytest.approx([math.sqrt(2) / 10] * 2)


def test_the_token_term_finds_a_planted_opener_and_forgives_what_topics_differ_by() -> None:
    drawn = generator(1)
    common = torch.randn(3, 40, generator=drawn)
    ours = (common + 0.5 * torch.randn(60, 3, 40, generator=drawn)).log_softmax(-1)
    planted = ours.clone()
    planted[:, 0, 7] += 6  # one opener becomes likelier everywhere
    reached = torch.ones(60, 3, dtype=torch.bool)
    found = token(ours, planted.log_softmax(-1), reached)
    again = (common + 0.5 * torch.randn(60, 3, 40, generator=drawn)).log_softmax(-1)
    assert found.low > 1
    assert token(ours, again, reached).low < 1  # as another draw of prompts would be
    same = token(ours, ours, reached)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_what_stands_beyond_the_end_of_an_answer_does_not_count() -> None:
    drawn = generator(2)
    ours, theirs = logits(40, drawn), logits(40, drawn)
    reached = torch.ones(40, 3, dtype=torch.bool)
    reached[::3, 2] = False
    whole = token(ours, theirs, reached)
    other = torch.where(reached[..., None], theirs, logits(40, drawn))
    torch.testing.assert_close(
        moved(theirs, other, reached).products, torch.zeros(6, 20, 20, dtype=torch.float64)
    )
    assert whole.value > 0


def test_the_behaviour_null_is_binomial() -> None:
    positive = torch.tensor([True] * 50 + [False] * 40)
    refused = torch.tensor([True] * 45 + [False] * 5 + [True] * 2 + [False] * 38)
    found = terms.behaviour_null(refused, positive, seed=0)
    random = scipy.stats
    rates = (45.5 / 51, 2.5 / 41)
    draws = []
    for p, n, seed in zip(rates, (50, 40), (1, 2), strict=True):
        both = random.binom.rvs(n, p, size=(2, 40_000), random_state=seed) / n
        draws.append(abs(both[0] - both[1]))
    expected = torch.stack([torch.from_numpy(d) for d in draws]).amax(0).quantile(0.95)
    assert found == pytest.approx(float(expected), abs=0.021)  # one prompt of 50


def test_the_behaviour_term_is_the_largest_change_of_a_rate() -> None:
    positive, groups = prompts(40)
    before = positive.clone()  # all harmful prompts refused, no twin
    after = before.clone()
    after[:40] = False  # half of them no longer
    null = terms.behaviour_null(before, positive, seed=0)
    found = terms.behaviour_term(before, after, positive, groups, null, count=300, seed=0)
    assert found.statistic == pytest.approx(0.5) and found.low > 1
    same = terms.behaviour_term(
        before, before, positive, groups, null, identical=True, count=300, seed=0
    )
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0) and null > 0


def test_intervals_of_a_distance_cover_the_truth_and_not_only_what_lies_above_it() -> None:
    """Resampled distances lie above the measured one, and that above the true one."""
    n, width, hits, values = 40, 12, 0, []
    drawn = generator(5)
    shift = torch.zeros(width, dtype=torch.float64)
    shift[0], shift[1] = 0.2, -0.2  # the true change of the mean
    positive, groups = prompts(n)
    for seed in range(150):
        change = shift + 0.3 * torch.randn(n, width, generator=drawn, dtype=torch.float64)
        made = halves.moves(
            lambda rows, step, change=change: change[groups[rows]],
            torch.ones(2 * n, 1, dtype=torch.bool), positive, groups,
        )  # fmt: skip
        null = halves.Null(torch.ones(2, dtype=torch.float64), 1.0)
        found = halves.token_term(made, null, count=300, seed=seed)
        hits += found.low <= float(shift.norm()) <= found.high
        values.append(found.value)
        assert found.low <= found.value <= found.high
    assert 0.93 <= hits / 150 <= 1.0
    assert sum(values) / 150 == pytest.approx(float(shift.norm()), rel=0.1)


def test_resamples_are_the_same_topics_for_every_checkpoint() -> None:
    a, b = terms.resamples(12, 50, seed=4), terms.resamples(12, 50, seed=4)
    assert torch.equal(a, b) and bool((a.sum(1) == 12).all())
    assert not torch.equal(a, terms.resamples(12, 50, seed=5))


def test_halves_share_every_stratum() -> None:
    strata = torch.tensor([1] * 4 + [2] * 4 + [3] * 9)
    split = terms.halves(strata, seed=0)
    for kind, size in ((1, 2), (2, 2), (3, 4)):
        assert bool((split[:, strata == kind].sum(1) == size).all())
    assert len({tuple(row.tolist()) for row in split}) > 100


def test_limits_of_a_rate_on_which_all_topics_agree_are_wilsons() -> None:
    """No interval is a point because forty prompts did the same: only equal weights are certain."""
    positive, groups = prompts(40)
    before, after = positive.clone(), torch.zeros(80, dtype=torch.bool)
    options = {"count": 100, "seed": 0}
    all_lost = terms.behaviour_term(before, after, positive, groups, 0.1, **options)
    low, _, high = sorted((scipy.stats.binomtest(40, 40).proportion_ci(method="wilson").low, 1, 1))
    assert (all_lost.low, all_lost.value, all_lost.high) == pytest.approx((10 * low, 10, 10 * high))
    unmoved = terms.behaviour_term(before, before, positive, groups, 0.1, **options)
    upper = scipy.stats.binomtest(0, 40).proportion_ci(method="wilson").high
    assert (unmoved.low, unmoved.value) == (0.0, 0.0)
    assert unmoved.high == pytest.approx(10 * upper)
    same = terms.behaviour_term(before, before, positive, groups, 0.1, identical=True, **options)
    assert (same.low, same.high) == (0.0, 0.0)
