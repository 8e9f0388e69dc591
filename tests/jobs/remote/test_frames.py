from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.remote.frames import PIECE_CHARACTERS, Frame, FrameStream, FrameWriter, Replay
from jobs.terminal import print_json, print_table, progress_bar, write_line


class Screen(io.StringIO):
    """The terminal where a command was typed."""

    encoding = "utf-8"

    def __init__(self, *, is_terminal: bool = False) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def streams(log: io.StringIO) -> tuple[FrameWriter, FrameStream, FrameStream]:
    writer = FrameWriter(log)
    return writer, FrameStream(writer, "out", is_terminal=False), FrameStream(writer, "err", is_terminal=False)


def replayed(lines: list[str], out: io.StringIO, err: io.StringIO) -> Replay:
    with Replay(out, err) as replay:
        for line in lines:
            if frame := Frame.of(line):
                replay.show(frame)
    return replay


@given(st.lists(st.tuples(st.sampled_from(["out", "err"]), st.text(st.characters(exclude_categories=["Cs"])))))
def test_text_arrives_on_its_stream_as_it_was_written(written: list[tuple[str, str]]) -> None:
    log, out, err = io.StringIO(), Screen(), Screen()
    _, stdout, stderr = streams(log)
    for name, text in written:
        (stdout if name == "out" else stderr).write(text)

    replayed(log.getvalue().split("\n"), out, err)

    assert out.getvalue() == "".join(text for name, text in written if name == "out")
    assert err.getvalue() == "".join(text for name, text in written if name == "err")


def test_no_line_is_longer_than_the_pieces_in_which_ray_passes_on_a_log() -> None:
    log = io.StringIO()
    _, stdout, _ = streams(log)

    stdout.write("\N{SNOWMAN}" * (3 * PIECE_CHARACTERS))

    assert all(len(line) < 3 * 20_000 for line in log.getvalue().splitlines())
    out = Screen()
    replayed(log.getvalue().splitlines(), out, Screen())
    assert out.getvalue() == "\N{SNOWMAN}" * (3 * PIECE_CHARACTERS)


def test_a_log_that_is_read_again_from_its_beginning_is_shown_once() -> None:
    log, out = io.StringIO(), Screen()
    writer, stdout, _ = streams(log)
    write_line(stdout, "first")
    write_line(stdout, "second")
    writer.exit(2)
    lines = log.getvalue().splitlines()

    replay = replayed([*lines[:1], *lines], out, Screen())

    assert out.getvalue() == "first\nsecond\n"
    assert replay.exit_code == 2


@pytest.mark.parametrize("line", ["", "2026-11-28 07:00:00,000\tINFO worker.py:1 -- x", '{"loss": 1}', '{"convmae": '])
def test_lines_of_others_are_not_frames(line: str) -> None:
    assert Frame.of(line) is None


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_looks_as_if_it_had_been_drawn_here(is_terminal: bool) -> None:
    log, there, here = io.StringIO(), Screen(is_terminal=is_terminal), Screen(is_terminal=is_terminal)
    stdout = FrameStream(FrameWriter(log), "out", is_terminal=is_terminal)
    with progress_bar("shards", stdout) as show:
        show(1, 4, "some")
        show(4, 4, "all")
    with progress_bar("shards", here) as show:
        show(1, 4, "some")
        show(4, 4, "all")

    replayed(log.getvalue().splitlines(), there, Screen())

    assert "4/4" in there.getvalue()
    if not is_terminal:  # a terminal also shows elapsed time
        assert there.getvalue() == here.getvalue()


def test_tables_and_json_look_as_on_this_machine() -> None:
    log, out = io.StringIO(), Screen()
    _, stdout, _ = streams(log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        patch.setenv("COLUMNS", "60")
        print_table(("run", "state"), [("first", "running")])
        print_json({"a": [1, 2]})

    replayed(log.getvalue().splitlines(), out, Screen())

    table, document = out.getvalue().split("{", 1)
    assert table.split() == ["run", "state", "first", "running"]
    assert json.loads("{" + document) == {"a": [1, 2]}


def test_what_this_terminal_cannot_show_is_escaped() -> None:
    log = io.StringIO()
    _, stdout, _ = streams(log)
    write_line(stdout, "café")
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")

    with Replay(ascii_only, Screen()) as replay:
        for line in log.getvalue().splitlines():
            frame = Frame.of(line)
            assert frame
            replay.show(frame)

    ascii_only.flush()
    assert ascii_only.buffer.getvalue() == b"caf\\xe9\n"  # type: ignore[attr-defined]
