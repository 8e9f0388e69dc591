from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.store import parted_write
from pipeline.store.parted_journal import SAVE_SECONDS, PartedJournal
from pipeline.store.storage import Storage

CONTENT = os.urandom(3000)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"{tmp_path}/object"


def write(journal: PartedJournal, *numbers: int) -> None:
    for number in numbers:
        start = (number - 1) * 1000
        data = CONTENT[start : start + 1000]
        journal.add(parted_write.write_part(Storage(), journal.target, number, start, data))


def names(url: str) -> list[str]:
    return sorted(path.name for path in Path(url).parent.iterdir())


def test_another_process_resumes_what_was_noted(url: str) -> None:
    first = PartedJournal(Storage(), url, "content")
    write(first, 3, 1)
    first.save()
    write(first, 2)

    second = PartedJournal(Storage(), url, "content")

    assert sorted(second.parts) == [1, 3]
    assert (second.target, second.written_bytes) == (first.target, 2000)
    write(second, 2)
    second.finish()
    second.forget()
    assert Path(url).read_bytes() == CONTENT
    assert names(url) == ["object"]


def test_it_is_written_when_time_has_passed_and_not_for_each_part(url: str) -> None:
    clock = Clock()
    journal = PartedJournal(Storage(), url, "content", clock=clock)

    write(journal, 1)
    assert not journal.is_saved
    clock.now = SAVE_SECONDS
    write(journal, 2)
    write(journal, 3)

    assert journal.is_saved
    assert sorted(PartedJournal(Storage(), url, "content").parts) == [1, 2]


@pytest.mark.parametrize("damage", ["another content", "no JSON", "no object", "a part without a number", "format 0"])
def test_what_is_of_another_content_or_cannot_be_read_starts_over(url: str, damage: str) -> None:
    journal = PartedJournal(Storage(), url, "content")
    write(journal, 1, 2)
    journal.save()
    place = Path(url).with_name(".object.parts.json")
    fields = json.loads(place.read_text())
    if damage == "a part without a number":
        del fields["parts"][0]["number"]
    fields["format"] -= damage == "format 0"
    place.write_text({"no JSON": "{", "no object": "[1]"}.get(damage, json.dumps(fields)))

    other = PartedJournal(Storage(), url, "another" if damage == "another content" else "content")

    assert other.parts == {}
    assert other.target != journal.target
    assert names(url) == [".object.parts.json"], "the old parts are gone"
    write(other, 1, 2, 3)
    other.finish()
    other.forget()
    assert names(url) == ["object"]


def test_an_object_that_became_visible_before_a_kill_is_known(url: str) -> None:
    journal = PartedJournal(Storage(), url, "content")
    write(journal, 1, 2, 3)
    journal.save()
    journal.finish()

    other = PartedJournal(Storage(), url, "content")

    assert other.is_visible and sorted(other.parts) == [1, 2, 3]
    other.finish()
    other.forget()
    assert names(url) == ["object"]


def test_what_is_abandoned_leaves_nothing(url: str) -> None:
    journal = PartedJournal(Storage(), url, "content")
    write(journal, 1)
    journal.save()

    journal.abandon()

    assert names(url) == []
