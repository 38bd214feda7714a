from collections import Counter

import numpy as np
import pytest

from sambalm.data_pipeline import order
from sambalm.data_pipeline.order import Blend, drawn, permuted


def _permutation(size: int, seed: tuple[int, ...]) -> list[int]:
    return [permuted(number, size=size, seed=seed) for number in range(size)]


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 1000, 4096, 4097])
def test_a_permutation_holds_every_number_once(size):
    assert sorted(_permutation(size, (0, 1, 2))) == list(range(size))


def test_permutations_depend_on_every_part_of_the_seed_and_on_nothing_else():
    base = _permutation(200, (1, 2, 3))
    assert base == _permutation(200, (1, 2, 3))
    others = [_permutation(200, seed) for seed in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (12, 3))]
    for other in others:
        # Two random permutations agree in one place on average.
        assert sum(a == b for a, b in zip(base, other, strict=True)) < 8
    assert base != list(range(200))


@pytest.mark.parametrize("size", [5, 16, 100])
def test_every_number_goes_everywhere_equally_often(size):
    draws = 200 * size
    for number in (0, size // 2, size - 1):
        counts = np.bincount([permuted(number, size=size, seed=(s,)) for s in range(draws)], minlength=size)
        statistic = ((counts - 200) ** 2 / 200).sum()
        # Chi-squared with size - 1 degrees of freedom: mean size - 1, deviation sqrt(2 (size - 1)).
        assert statistic < size - 1 + 5 * (2 * (size - 1)) ** 0.5


def test_neighbours_are_sent_far_apart():
    steps = np.diff(_permutation(20_000, (7,)))
    # |x - y| of independent uniform numbers is a third of the range on average.
    assert abs(np.abs(steps).mean() / 20_000 - 1 / 3) < 0.01
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.03  # as of independent numbers


def test_orders_are_those_of_the_runs_that_have_begun():
    """A checkpoint keeps how many samples were taken, not which: another order would be other data after a resume."""
    assert _permutation(16, (1, 2, 3)) == [10, 1, 13, 4, 5, 14, 15, 9, 7, 12, 3, 8, 6, 2, 0, 11]
    assert [permuted(n, size=1000, seed=(7, 0, 1)) for n in range(8)] == [944, 923, 331, 82, 811, 153, 336, 29]
    assert [drawn(1000, seed=(7, 0, epoch)) for epoch in range(4)] == [605, 923, 330, 40]
    blend = Blend([3.0, 1.0, 2.0])
    assert [blend.locate(n) for n in range(8)] == [(1, 0), (0, 0), (2, 0), (0, 1), (0, 2), (2, 1), (1, 1), (0, 3)]
    assert blend.locate(5000) == (2, 1666)


def test_drawn_numbers_stay_in_range():
    assert {drawn(3, seed=(s,)) for s in range(100)} == {0, 1, 2}
    assert drawn(1, seed=(0,)) == 0


def _random_weights(random: np.random.RandomState) -> list[float]:
    return (random.pareto(0.7, size=random.randint(1, 30)) + 1e-3).tolist()


def test_every_source_gives_its_samples_in_turn_and_keeps_its_share():
    random = np.random.RandomState(0)
    for _ in range(50):
        weights = _random_weights(random)
        blend, shares = Blend(weights), np.array(weights) / np.sum(weights)
        given = np.zeros(len(weights), dtype=np.int64)
        for number in range(2100):  # across the borders of blocks
            source, sample = blend.locate(number)
            assert sample == given[source]
            given[source] += 1
            assert np.abs(given - (number + 1) * shares).max() < 1 + len(weights) ** 0.5
            if number % 500 == 0:
                assert blend.counts(number + 1).tolist() == given.tolist()


def test_the_order_is_the_same_wherever_one_begins_to_ask():
    weights = [0.61, 0.3, 0.09]
    whole = [Blend(weights).locate(number) for number in range(5000)]
    for number in (4999, 1023, 1024, 1025, 0, 2500):
        assert Blend(weights).locate(number) == whole[number]
    far = 10**12
    source, sample = Blend(weights).locate(far)
    assert abs(sample - far * weights[source]) < 2


def test_sources_of_one_share_do_not_give_their_samples_all_at_once():
    blend = Blend([0.5] + [0.0005] * 1000)
    for start in range(0, 4000, 100):
        first = sum(blend.locate(number)[0] == 0 for number in range(start, start + 100))
        assert 40 <= first <= 60


def test_without_phases_they_would(monkeypatch):
    monkeypatch.setattr(order, "_GOLDEN_RATIO", 0.0)
    blend = Blend([0.5] + [0.0005] * 1000)
    assert Counter(blend.locate(number)[0] for number in range(400)) == {0: 400}
