from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jobs
from jobs.terminal import bytes_text, print_table, progress_bar, say, shown, whole_lines, write_line
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
        (["a\r", "b\n"], ["a\rb"]),  # a redrawn bar is one line
    ],
)
def test_pieces_become_complete_lines(pieces: list[str], lines: list[str]) -> None:
    assert list(whole_lines(pieces)) == lines


FORGED = "a\x1b[2J\nok: all is well\r\u202etxt.exe\udcff"
SHOWN = r"a\x1b[2J\nok: all is well\r\u202etxt.exe\udcff"


def test_names_cannot_forge_lines_or_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"passing over {FORGED}")
    print_table(("name", "what"), [(FORGED, "[link=x]not a link[/nope]")])

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"passing over {SHOWN}"
    assert "".join(lines[1:]).count(SHOWN) == 1
    assert "[link=x]not a link[/nope]" in "".join(lines[1:])
    assert str(UserError("tar", "must be whole", 1, FORGED)) == f"tar: must be whole, got 1; {SHOWN}"


def test_letters_of_all_languages_are_printed_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    say("größe 图像\u3000· é")

    assert capsys.readouterr().out == "größe 图像\u3000· é\n"


PROJECT = Path(jobs.__file__).parents[1]


def convmae(script: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A line of shell in which $CONVMAE is the command."""
    command = f"{sys.executable} -m jobs.cli.main"
    variables = {**os.environ, "CONVMAE_HOME": "/nonexistent", "CONVMAE": command, "COLUMNS": "80", **environment}
    line = ["bash", "-c", f"set -o pipefail; {script}"]
    return subprocess.run(line, cwd=PROJECT, env=variables, capture_output=True, check=False)


@pytest.mark.parametrize(
    ("encoding", "text", "written"),
    [
        ("utf-8", "photographs → shards · größe …", "photographs → shards · größe …"),
        ("latin-1", "photographs → shards · größe …", "photographs -> shards · größe ..."),
        ("ascii", "photographs → shards · größe …", r"photographs -> shards - gr\xf6\xdfe ..."),
        ("ascii", "\U0001f4f7\udcff", r"\U0001f4f7\udcff"),
        ("utf-8", "a\udcffb", r"a\udcffb"),
        ("cp1252", "→…", "->…"),
    ],
)
def test_characters_that_an_encoding_lacks_are_replaced(encoding: str, text: str, written: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    assert shown(text, stream) == written

    write_line(stream, text)
    assert stream.buffer.getvalue().decode(encoding) == f"{written}\n"  # type: ignore[attr-defined]


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict", "TERM": "dumb"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_help_is_shown_in_any_encoding(environment: dict[str, str]) -> None:
    ended = convmae("$CONVMAE --help", **environment)

    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"Pretrain ConvMAE: photographs " in ended.stdout
    assert b"photographs -> WebDataset" in ended.stdout


def test_errors_with_any_name_are_one_line_in_any_encoding() -> None:
    ended = convmae(r"$CONVMAE inspect $'/größe\xff\n/x'", PYTHONIOENCODING="ascii")

    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.isascii() and rb"gr\xf6" in line and rb"\udcff" in line


@pytest.mark.parametrize(
    ("words", "code"),
    [("inspect tiny >&-", 0), ("inspect tinny 2>&-", 2), ("inspect tinny <&- >&-", 2), ("--help >&- 2>&- <&-", 0)],
)
def test_closed_streams_change_nothing_but_the_output(words: str, code: int) -> None:
    ended = convmae(f"$CONVMAE {words}")

    assert ended.returncode == code
    assert b"Traceback" not in ended.stderr and ended.stderr.count(b"\n") <= 1


def test_a_command_whose_reader_leaves_ends_silently() -> None:
    ended = convmae("$CONVMAE simulate --help | true")

    assert ended.stderr == b""
    assert ended.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this machine has no /dev/full")
def test_a_full_disk_is_reported() -> None:
    ended = convmae("$CONVMAE inspect tiny > /dev/full")

    assert ended.returncode == 1
    assert ended.stderr == b"failed: [Errno 28] No space left on device\n"


def test_progress_is_drawn_on_an_ascii_terminal() -> None:
    screen = Terminal(io.BytesIO(), "ascii", errors="strict")

    with progress_bar("größe", screen) as show:
        show(1, 2, "12 images · ETA 3s")

    drawn = screen.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"12 images - ETA 3s" in drawn and rb"gr\xf6\xdfe" in drawn
