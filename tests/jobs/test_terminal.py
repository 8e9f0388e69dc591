from __future__ import annotations

import pytest

from jobs.terminal import bytes_text


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
