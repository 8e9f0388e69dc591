from __future__ import annotations

import pytest

from jobs.terminal import bytes_text, whole_lines


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (47_373, "47.4 kB"),
        (999_600, "1.00 MB"),
        (147_897_477_120, "148 GB"),
        (2e14, "200 TB"),
        (5e18, "5000 PB"),
    ],
)
def test_bytes_have_three_digits_and_a_unit(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        ([], []),
        (["a\nb\n"], ["a", "b"]),
        (["a", "b\n", "\nc"], ["ab", "", "c"]),
        (["a\r", "b\n"], ["a\rb"]),  # a bar that is redrawn is one line
    ],
)
def test_pieces_become_whole_lines(pieces: list[str], lines: list[str]) -> None:
    assert list(whole_lines(pieces)) == lines
