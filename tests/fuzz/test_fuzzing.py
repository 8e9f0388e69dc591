"""The fuzzers find what is planted: faults of parsers, hangs, memory, reads elsewhere, errors that say nothing."""

from __future__ import annotations

import json
import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import MINUTES_VARIABLE, SEED_VARIABLE, Budget, Fuzz, Hunt, TookTooLong, check_reported, reading_only
from hypothesis import strategies as st
from mutations import ODD_TEXTS, damaged, json_documents, json_lines
from odd_files import jpeg_of, jpeg_parts, picture, png_of, png_parts, webp_of, webp_parts
from pydantic import TypeAdapter

from jobs.run import rows as run_rows
from jobs.run.directory import RunDirectory
from pipeline.access import urls as store_urls
from pipeline.errors import StorageError, UserError
from pipeline.store.storage import Storage


def hunted(
    target: Callable[[Any], object], examples: st.SearchStrategy[Any], seed: int = 0, batch: int = 300, **limits: Any
) -> Hunt:
    """What a hunt of one batch came to."""
    hunts: list[Hunt] = []
    try:
        Fuzz(Budget(seed), hunts.append)(target, examples, batch=batch, **limits)
    except (Exception, TookTooLong):
        assert hunts[0].found
    return hunts[0]


def test_a_parser_without_a_fault_is_found_to_have_none() -> None:
    def counts(number: int) -> None:
        if number < 0:
            raise UserError("number", "must not be negative", number, "give another")

    hunt = hunted(counts, st.integers())

    assert (hunt.found, hunt.examples) == ("", 300)
    assert 0 < hunt.refused < 300
    assert hunt.line.startswith("counts: 300 examples in ") and hunt.line.endswith("(seed 0); found nothing")


def test_the_seed_that_is_printed_gives_the_finding_again() -> None:
    seen: list[bytes] = []

    def parses(data: bytes) -> None:
        seen.append(data)
        assert b"\x81" not in data, "a byte that nobody thought of"

    examples = st.binary(max_size=6)
    seed = next(seed for seed in range(1000) if hunted(parses, examples, seed, batch=20).found)
    line = hunted(parses, examples, seed, batch=20).line
    first = list(seen)

    assert f"{SEED_VARIABLE}={seed} gives it again" in line
    seen.clear()
    budget = Budget.from_environment({SEED_VARIABLE: str(seed)}, targets=7)
    with pytest.raises(AssertionError, match="nobody thought of"):
        Fuzz(budget)(parses, examples, batch=20)
    assert seen == first[-len(seen) :]


def test_time_is_shared_between_targets_and_batches_continue_until_it_is_over() -> None:
    budget = Budget.from_environment({MINUTES_VARIABLE: "0.05", SEED_VARIABLE: "5"}, targets=6)
    assert budget == Budget(seed=5, seconds=0.5)

    hunt = Fuzz(budget)(lambda number: time.sleep(0.01), st.integers(), batch=3)

    assert 0.5 <= hunt.seconds < 20 and hunt.seed > hunt.first_seed == 5
    assert hunt.examples == 3 * (hunt.seed - 4)
    assert Budget.from_environment({}, targets=6) == Budget(seed=0, seconds=0.0)
    seeds = {Budget.from_environment({MINUTES_VARIABLE: "1"}, targets=6).seed for _ in range(8)}
    assert len(seeds) > 1


def test_an_example_that_does_not_end_is_reported_with_its_place() -> None:
    def waits(number: int) -> None:
        if number == 0:
            with pytest.raises(ValueError):  # whoever catches exceptions does not catch this one
                threading.Event().wait()

    hunt = hunted(waits, st.integers(), most_seconds=0.5)

    assert hunt.found.startswith("TookTooLong: more than ") and "threading.py" in hunt.found
    assert hunt.seconds >= 2.0  # who computes nothing may wait for longer


# Pages of its own: a large heap that tests before have freed gives 64 MiB without growing.
@pytest.mark.parametrize("take", [lambda: mmap.mmap(-1, 64 << 20).write(b"x" * (64 << 20)), lambda: bytearray(1 << 40)])
def test_memory_that_an_example_takes_is_reported(take: Callable[[], object]) -> None:
    def takes(number: int) -> None:
        if number > 1000:
            take()

    assert hunted(takes, st.integers(), most_bytes=32 << 20).found.startswith(("AssertionError", "MemoryError"))


def test_a_file_outside_of_the_root_is_reported(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for path in (tmp_path / "secret", root / "own"):
        path.write_text("x")
    (root / "link").symlink_to(tmp_path / "secret")

    with reading_only(root):
        (root / "own").read_text()
        Path("/proc/self/status").read_text()
    for place in (tmp_path / "secret", root / ".." / "secret", root / "link"):
        with pytest.raises(AssertionError, match="outside of the root"), reading_only(root):
            place.read_text()
    with pytest.raises(AssertionError, match="outside of the root"), reading_only(root):
        list(tmp_path.iterdir())


class LongError(UserError):
    def __str__(self) -> str:
        return "x" * 10_000


@pytest.mark.parametrize(
    "error",
    [
        UserError("field", "rule", "value", ""),
        UserError(" ", "rule", "value", "remedy"),
        LongError("field", "rule", "value", "remedy"),
    ],
)
def test_an_error_that_is_no_help_is_found(error: UserError) -> None:
    check_reported(UserError("field", "rule", "a\nb\x1b[2J", "remedy" * 10_000))
    with pytest.raises(AssertionError):
        check_reported(error)


# Faults planted in the parsers themselves


def test_a_row_checker_that_forgets_a_type_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(Storage(), str(tmp_path))
    rows = [{"step": 1, "epoch": 0, "loss": 0.5, "learning_rate": 1e-3, "world_size": 2, "attempt": 1}]

    def reads(data: bytes) -> None:
        run.storage.write(run.path("history", "0001-00000001.jsonl"), data)
        assert sum(row["step"] for row in run.read_history()) >= -(2**53)

    assert not hunted(reads, json_lines(rows)).found
    monkeypatch.setitem(run_rows._ROWS, "history", TypeAdapter(dict))
    assert hunted(reads, json_lines(rows)).found


def test_a_url_check_that_forgets_a_protocol_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = st.sampled_from(("", "file://", "s3://", "gopher://")).map(lambda start: f"{start}a")

    def asks(url: str) -> None:
        assert store_urls.is_local(url) or store_urls.is_s3(url)

    assert not hunted(asks, urls).found
    monkeypatch.setattr(store_urls, "StorageError", lambda *parts: KeyError(parts))
    assert hunted(asks, urls).found.startswith("KeyError")
    assert StorageError


def test_a_decoder_of_json_without_a_bound_is_found() -> None:
    def parses(data: bytes) -> None:
        try:
            json.loads(data)
        except ValueError as error:
            raise UserError("file", "must hold JSON", data[:20], "restore it") from error

    assert "RecursionError" in hunted(parses, json_documents({"a": 1})).found


# Material


def test_files_are_put_together_as_they_were_taken_apart() -> None:
    for form, parts_of, whole_of in (
        ("JPEG", jpeg_parts, jpeg_of),
        ("PNG", png_parts, png_of),
        ("WEBP", webp_parts, webp_of),
    ):
        data = picture(3, form)
        parts = parts_of(data)
        assert len(parts) > (0 if form == "WEBP" else 2)
        assert whole_of(parts) == data


def test_damage_is_of_many_kinds() -> None:
    lengths, unchanged, odd = set(), 0, 0
    data = bytes(range(200))

    def sees(found: bytes) -> None:
        nonlocal unchanged
        lengths.add(len(found))
        unchanged += found == data

    def reads(found: bytes) -> None:
        nonlocal odd
        try:
            json.loads(found)
        except (ValueError, RecursionError):
            odd += 1

    hunted(sees, damaged(data))
    hunted(reads, json_documents({"a": [1, {"b": "x"}]}))
    assert len(lengths) > 10 and 0 < unchanged < 200 and 10 < odd < 290
    assert len(set(ODD_TEXTS)) == len(ODD_TEXTS)
