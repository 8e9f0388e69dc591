"""When a run counts as slow."""

from __future__ import annotations

from jobs.metrics.speed_watch import BLOCK_STEPS, LEAST_BLOCKS, SpeedWatch


def blocks(watch: SpeedWatch, *seconds: float, world_size: int = 2, flops: float = 1e9) -> list[str]:
    """What is found in blocks whose steps take so many seconds."""
    return ["".join(watch.step_done(each, world_size, flops) for _ in range(BLOCK_STEPS)) for each in seconds]


def usual() -> SpeedWatch:
    watch = SpeedWatch(global_batch_size=64)
    assert blocks(watch, 9.0, *([1.0] * LEAST_BLOCKS)) == [""] * (LEAST_BLOCKS + 1), "the first has cold caches"
    return watch


def test_less_than_half_of_the_usual_speed_is_slow_and_said_once_until_it_is_over() -> None:
    watch = usual()

    found = blocks(watch, 1.9, 2.1, 2.1, 1.5, 1.0, 2.1)

    slow = "15.2 images/s and rank over 100 steps, 48% of the usual 32.0"
    assert found == ["", slow, "", "", "", slow], "1.5 s is not fast enough again, 1.0 s is"


def test_a_resize_is_no_slowdown_and_the_first_block_of_an_attempt_does_not_count() -> None:
    watch = usual()

    watch.begin_attempt()
    found = blocks(watch, 20.0, 2.0, world_size=1)
    watch.begin_attempt()
    found += blocks(watch, 20.0, 4.1, world_size=1)

    assert found == ["", "", "", "15.6 images/s and rank over 100 steps, 49% of the usual 32.0"]


def test_larger_images_are_no_slowdown_and_are_compared_with_each_other_alone() -> None:
    watch = usual()

    found = blocks(watch, 9.0, *([3.0] * LEAST_BLOCKS), 6.5, flops=2e9)

    slow = "4.9 images/s and rank over 100 steps, 46% of the usual 10.7"
    assert found == [*([""] * (LEAST_BLOCKS + 1)), slow], "the first block compiles"


def test_nothing_is_slow_before_there_is_a_past() -> None:
    assert blocks(SpeedWatch(64), 1.0, *([1.0] * (LEAST_BLOCKS - 1)), 50.0) == [""] * (LEAST_BLOCKS + 1)
