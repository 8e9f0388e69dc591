import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jobs.report.charts import CANVASES, Canvas, training_chart
from jobs.report.curves import History, speeds, thinned, trend
from jobs.run.step_table import StepTable

Series = tuple[np.ndarray, np.ndarray]


def chart(history: History, restarts: list[int], canvas: Canvas) -> str:
    return training_chart(history, global_batch_size=64, restarts=restarts, epoch_steps=31, canvas=canvas)


def noisy(length: int) -> Series:
    return np.arange(1.0, length + 1), np.random.default_rng(0).normal(size=length)


def history(length: int, world_sizes: tuple[int, ...] = (2,)) -> History:
    return History.of(
        StepTable.of(
            {"step": step, "loss": 1 / step, "learning_rate": 1e-3, "world_size": world_sizes[step % len(world_sizes)]}
            for step in range(1, length + 1)
        )
    )


@pytest.mark.parametrize("length", [5, 99, 101, 5_000, 200_003])
@pytest.mark.parametrize("points", [4, 100, 1001])
def test_thinned_series_is_short_and_keeps_first_last_and_both_extremes(length: int, points: int) -> None:
    steps, values = noisy(length)

    left_steps, left_values = thinned(steps, values, points)

    assert len(left_steps) == len(left_values) <= points
    assert (left_steps[0], left_values[0]) == (steps[0], values[0])
    assert (left_steps[-1], left_values[-1]) == (steps[-1], values[-1])
    assert (left_values.min(), left_values.max()) == (values.min(), values.max())
    assert (np.diff(left_steps) > 0).all()
    np.testing.assert_array_equal(left_values, values[left_steps.astype(int) - 1])


def test_series_that_is_short_already_is_left_as_it_is() -> None:
    steps, values = noisy(100)

    left_steps, left_values = thinned(steps, values, 100)

    np.testing.assert_array_equal(left_steps, steps)
    np.testing.assert_array_equal(left_values, values)


@pytest.mark.parametrize("length", [1, 7, 1000])
def test_trend_of_a_line_is_on_the_line(length: int) -> None:
    steps = np.arange(1.0, length + 1)

    mean_steps, mean_values = trend(steps, 3 * steps + 1, 10)

    assert len(mean_steps) == min(length, 10)
    np.testing.assert_allclose(mean_values, 3 * mean_steps + 1)


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("length", [1, 2, 3000])
def test_chart_is_well_formed_svg_that_fits_its_canvas_and_is_drawn_alike_twice(canvas: Canvas, length: int) -> None:
    text = chart(history(length), [], canvas)

    root = ET.fromstring(text.replace("xlink:", ""))  # HTML needs no declaration of the prefix, XML does
    assert root.tag == "svg"
    assert root.attrib["class"] == canvas.name
    assert float(root.attrib["viewBox"].split()[2]) == canvas.width_pixels
    assert text == chart(history(length), [], canvas)


def test_chart_takes_every_colour_from_the_page() -> None:
    text = chart(history(50, (2, 1)), [10], CANVASES[0])

    assert set(re.findall(r"(?:stroke|fill): ([^;\"]+)", text)) == {
        "none", "var(--ink)", "var(--faint)", "var(--rule)", "var(--accent)", "var(--mark)",
    }  # fmt: skip


def test_each_step_of_a_restart_is_marked_once_in_every_panel() -> None:
    def marks(restarts: list[int]) -> int:
        return chart(history(50), restarts, CANVASES[0]).count("var(--mark)")

    assert marks([]) == 0
    assert marks([10, 20, 20]) == 2 * marks([10]) > 0


def test_speed_is_that_of_the_steps_that_were_timed() -> None:
    rows = [{"step": step, "loss": 1.0, "learning_rate": 1e-3, "world_size": 2} for step in range(1, 41)]
    timed = [row | {"step_seconds": 0.5 if row["step"] <= 20 else 2.0} for row in rows]
    mixed = History.of(StepTable.of(rows[:10] + timed[10:]))

    steps, images_per_second = speeds(mixed, global_batch_size=64)

    assert steps.tolist() == list(range(11, 41))
    assert images_per_second.tolist() == [128.0] * 10 + [32.0] * 20
    assert 'aria-label="loss, learning rate, images/s over 40 steps"' in chart(mixed, [], CANVASES[0])
    assert ">images/s<" not in chart(History.of(StepTable.of(rows)), [], CANVASES[0])


def test_mfu_is_drawn_where_steps_have_one() -> None:
    rows = [{"step": step, "loss": 1.0, "learning_rate": 1e-3, "world_size": 2} for step in range(1, 41)]
    some = History.of(StepTable.of(rows), np.where(np.arange(len(rows)) < 10, np.nan, 0.4))

    assert 'aria-label="loss, learning rate, MFU over 40 steps"' in chart(some, [], CANVASES[0])
    assert ">MFU<" not in chart(History.of(StepTable.of(rows)), [], CANVASES[0])


def test_workers_are_drawn_only_where_their_number_changed() -> None:
    assert ">workers<" not in chart(history(50, (2,)), [], CANVASES[0])
    assert ">workers<" in chart(history(50, (2, 1)), [], CANVASES[0])


def test_chart_of_a_million_steps_stays_small() -> None:
    steps, values = noisy(1_000_000)
    names = ("step", "loss", "learning_rate", "world_size", "step_seconds")
    columns = (steps.astype(np.int64), values, np.abs(values), np.full(len(steps), 2), np.abs(values))
    long = History.of(StepTable(len(steps), dict(zip(names, columns, strict=True))), np.abs(values))

    assert len(chart(long, [], CANVASES[0])) < 200_000
