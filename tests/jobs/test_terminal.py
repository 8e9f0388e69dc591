from __future__ import annotations

import pytest

from jobs.terminal import bytes_text, print_table, say, whole_lines
from pipeline.errors import UserError


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


FORGED = "a\x1b[2J\nok: all is well\r\u202etxt.exe\udcff"
SHOWN = r"a\x1b[2J\nok: all is well\r\u202etxt.exe\udcff"


def test_names_can_forge_no_line_and_move_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"passing over {FORGED}")
    print_table(("name", "what"), [(FORGED, "[link=x]not a link[/nope]")])

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"passing over {SHOWN}"
    assert "".join(lines[1:]).count(SHOWN) == 1
    assert "[link=x]not a link[/nope]" in "".join(lines[1:])
    assert str(UserError("tar", "must be whole", 1, FORGED)) == f"tar: must be whole, got 1; {SHOWN}"


def test_letters_of_all_languages_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    say("größe 图像\u3000· é")

    assert capsys.readouterr().out == "größe 图像\u3000· é\n"
