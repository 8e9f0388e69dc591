"""Which ranks are named as stragglers, by figures alone. Real ranks: tests/jobs/control/test_straggling_run.py."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jobs.health.interface import HealthState
from jobs.health.stragglers import (
    LEAST_EXCESS_SECONDS,
    WINDOW_STEPS,
    Straggler,
    StragglerEvaluator,
    StragglerWatch,
    medians_of_others,
)
from jobs.metrics.rank_figures import FigureTable, RankFigures

IMAGES = 8.0


def figures(compute: float = 0.1, read: float = 0.0, decode: float = 0.0, images: float = IMAGES) -> RankFigures:
    return RankFigures(compute_seconds=compute, data_wait_seconds=read + decode, read_wait_seconds=read, images=images)


def table(*ranks: RankFigures) -> FigureTable:
    return np.array(ranks, np.float64)


def judged(steps: int, *ranks: RankFigures, factor: float = 1.5) -> list[Straggler]:
    """What is said after so many steps, all alike."""
    evaluator = StragglerEvaluator(factor)
    found: list[Straggler] = []
    for _ in range(steps):
        found = list(evaluator.evaluate(HealthState(reported=table(*ranks))))
    return found


def test_the_median_of_the_others_leaves_out_each_value_itself() -> None:
    generator = np.random.default_rng(0)
    for count in range(2, 8):
        for values in (generator.random(count), generator.integers(0, 3, count).astype(np.float64)):
            expected = [np.median(np.delete(values, place)) for place in range(count)]
            assert medians_of_others(values).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("slow", "part"),
    [
        (figures(compute=0.3), "computing"),
        (figures(read=0.3), "reading"),
        (figures(decode=0.3), "decoding"),
        (figures(compute=0.2, decode=0.11), "decoding"),
    ],
)
@pytest.mark.parametrize("others", [1, 2, 5])
def test_a_slow_rank_is_named_with_the_part_in_which_it_loses_most(slow: RankFigures, part: str, others: int) -> None:
    (found,) = judged(WINDOW_STEPS, *[figures()] * others, slow)

    assert (found.rank, found.part, found.target_ranks) == (others, part, (others,))
    assert found.others_seconds == pytest.approx(0.1)
    assert found.own_seconds == pytest.approx(slow.compute_seconds + slow.data_wait_seconds)
    assert f"rank {others} takes" in found.reason and part in found.reason


def test_two_slow_ranks_of_five_are_both_named() -> None:
    ranks = [figures(), figures(0.2), figures(), figures(0.25), figures()]

    assert [each.rank for each in judged(WINDOW_STEPS, *ranks)] == [1, 3]


def test_nobody_is_named_before_a_window_is_full() -> None:
    assert not judged(WINDOW_STEPS - 1, figures(), figures(), figures(9.0))


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param([figures(), figures(0.14), figures()], id="below the factor"),
        pytest.param([figures(0.001), figures(0.001), figures(0.001 + LEAST_EXCESS_SECONDS / 2)], id="costs nothing"),
        pytest.param([figures(0.1, images=8), figures(0.2, images=16), figures(0.1, images=8)], id="has more images"),
        pytest.param([figures(9.0)], id="is alone"),
        pytest.param([figures(0.0, images=0)] * 3, id="nothing was computed before"),
    ],
)
def test_who_is_no_straggler(ranks: list[RankFigures]) -> None:
    assert not judged(3 * WINDOW_STEPS, *ranks)


def test_a_rank_with_half_of_the_images_and_the_same_time_is_one() -> None:
    ranks = [figures(0.1), figures(0.1), figures(0.1, images=IMAGES / 2)]

    assert [each.rank for each in judged(WINDOW_STEPS, *ranks)] == [2]


def test_long_pauses_now_and_then_name_nobody() -> None:
    """A garbage collection, a save: however long, they are few."""
    evaluator, found = StragglerEvaluator(1.5), []
    for step in range(200):
        slow = figures(30.0 if step % 10 == 0 else 0.1)
        found += evaluator.evaluate(HealthState(reported=table(figures(), slow, figures())))

    assert not found


def test_a_rank_that_waits_for_a_whole_window_of_its_order_now_and_then_is_named() -> None:
    """One step of five waits for all that was to be read for five."""
    evaluator, found = StragglerEvaluator(1.5), []
    for step in range(WINDOW_STEPS):
        late = figures(read=0.6 if step % 5 == 0 else 0.0)
        found = list(evaluator.evaluate(HealthState(reported=table(figures(), late, figures()))))

    assert [(each.rank, each.part) for each in found] == [(1, "reading")]


def test_bursts_in_most_steps_are_one_spell_which_ends() -> None:
    watch, began, ended = StragglerWatch(1.5), [], []
    bursts = itertools.chain(
        (step % 3 > 0 for step in range(60)),  # two steps of three
        (step % 3 == 0 for step in range(60)),  # one of three: not enough to begin a spell, enough for it to last
        (False for _ in range(60)),
    )
    for step, is_slow in enumerate(bursts, start=1):
        ranks = table(figures(), figures(0.4 if is_slow else 0.1), figures())
        begins, ends = watch.see(ranks, step, now=100.0 + step)
        began += begins
        ended += [(spell, step) for spell in ends]
        assert watch.count == len(began) - len(ended)

    (spell,) = began
    assert (spell.straggler.rank, spell.first_step, spell.began_at) == (1, WINDOW_STEPS, 100.0 + WINDOW_STEPS)
    ((same, last_step),) = ended
    assert same is spell and 120 < last_step <= 120 + WINDOW_STEPS


def test_an_attempt_forgets_what_was_seen_in_the_one_before() -> None:
    watch = StragglerWatch(1.5)
    slow = table(figures(), figures(0.4), figures())
    for step in range(1, WINDOW_STEPS + 1):
        watch.see(slow, step, now=0.0)

    (spell,) = watch.begin_attempt()

    assert spell.straggler.rank == 1 and watch.count == 0
    assert not watch.begin_attempt()
    fewer = table(figures(0.4), figures())
    assert not any(any(watch.see(fewer, step, now=0.0)) for step in range(WINDOW_STEPS - 1))
    (began, _) = watch.see(fewer, WINDOW_STEPS, now=0.0)
    assert [each.straggler.rank for each in began] == [0]


@pytest.mark.parametrize("factor", [1.2, 2.0, 4.0])
def test_the_factor_is_the_recipes(factor: float) -> None:
    def ranks(ratio: float) -> list[RankFigures]:
        return [figures(0.1), figures(0.1 * ratio), figures(0.1)]

    assert judged(WINDOW_STEPS, *ranks(factor * 1.05), factor=factor)
    assert not judged(WINDOW_STEPS, *ranks(factor * 0.95), factor=factor)


def test_a_thousand_ranks_are_judged_in_milliseconds() -> None:
    import time

    evaluator = StragglerEvaluator(1.5)
    ranks = table(*[figures(0.1 + 1e-5 * (number % 7)) for number in range(1000)])
    began = time.process_time()
    for _ in range(2 * WINDOW_STEPS):
        evaluator.evaluate(HealthState(reported=ranks))

    assert (time.process_time() - began) / (2 * WINDOW_STEPS) < 0.02
