from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import in_a_namespace_of_its_own
import pytest

from pipeline.errors import CredentialsError, LeaseHeldError
from pipeline.store.lease import Holder, current_lease, hold_lease
from pipeline.store.storage import Storage

ELSEWHERE = "another-machine"


def no_wait(_: str) -> None:
    raise AssertionError("no other process is there")


def holder_elsewhere(folder: Path, beat: int = 0, number: int = 1) -> Path:
    """A lease of a process on another machine, of which only its beat is known."""
    content = {**asdict(Holder.here("convmae shard")), "host": ELSEWHERE, "token": "theirs", "beat": beat}
    path = folder / f"claim-{number:06d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


class Clock:
    """Time that passes only in sleep."""

    def __init__(self, on_sleep: Callable[[float], None] = lambda now: None) -> None:
        self.now = 0.0
        self._on_sleep = on_sleep

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._on_sleep(self.now)


def test_a_lease_is_held_while_the_context_is_open_and_leaves_nothing(tmp_path: Path) -> None:
    with hold_lease(Storage(), str(tmp_path), "convmae shard", on_wait=no_wait) as lease:
        lease.check()
        assert [path.name for path in tmp_path.iterdir()] == ["claim-000001.json"]

    assert list(tmp_path.iterdir()) == []
    with hold_lease(Storage(), str(tmp_path), "convmae shard", on_wait=no_wait):
        pass


def test_a_second_process_learns_who_works_there_and_since_when(tmp_path: Path) -> None:
    clock = Clock(lambda now: holder_elsewhere(tmp_path, beat=int(now // 4)) and None)
    holder_elsewhere(tmp_path)
    watched: list[str] = []

    with (
        pytest.raises(LeaseHeldError, match="since 20") as caught,
        hold_lease(Storage(), str(tmp_path), "convmae index", on_wait=watched.append, clock=clock, sleep=clock.sleep),
    ):
        pass

    assert f"@{ELSEWHERE} (process {os.getpid()}, convmae shard" in str(caught.value)
    assert len(watched) == 1 and ELSEWHERE in watched[0]
    assert clock.now < 10


def test_a_silent_holder_counts_as_dead_and_is_taken_over_from(tmp_path: Path) -> None:
    clock = Clock()
    holder_elsewhere(tmp_path)

    with hold_lease(Storage(), str(tmp_path), "x", on_wait=lambda _: None, clock=clock, sleep=clock.sleep):
        assert 30 <= clock.now < 35
        assert sorted(path.name for path in tmp_path.iterdir()) == ["claim-000001.json", "claim-000002.json"]

    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_leaves_while_it_is_watched_makes_room(tmp_path: Path) -> None:
    theirs = holder_elsewhere(tmp_path)
    clock = Clock(lambda now: theirs.unlink(missing_ok=True) if now > 3 else None)

    with hold_lease(Storage(), str(tmp_path), "x", on_wait=lambda _: None, clock=clock, sleep=clock.sleep):
        assert clock.now < 6


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_a_lease_that_was_never_written_whole_expires(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "claim-000001.json").write_bytes(content)
    clock = Clock()

    with hold_lease(Storage(), str(tmp_path), "x", on_wait=lambda _: None, clock=clock, sleep=clock.sleep):
        assert clock.now >= 30


def test_a_holder_that_was_killed_on_this_machine_is_known_to_be_dead_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pipeline.store.lease import hold_lease; from pipeline.store.storage import Storage\n"
        "with hold_lease(Storage(), sys.argv[1], 'convmae shard', on_wait=print):\n"
        "    print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    began = time.monotonic()
    with hold_lease(Storage(), str(tmp_path), "x", on_wait=no_wait):
        assert time.monotonic() - began < 2


HOLDS = """
import sys
from pipeline.store.lease import hold_lease
from pipeline.store.storage import Storage
with hold_lease(Storage(), sys.argv[1], 'convmae shard', on_wait=print) as lease:
    print('held', flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not in_a_namespace_of_its_own.is_allowed(), reason="this machine makes no PID namespaces")
def test_a_live_lease_of_another_container_on_this_machine_is_not_taken_over(tmp_path: Path) -> None:
    with in_a_namespace_of_its_own.running(HOLDS, str(tmp_path)) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with (
            pytest.raises(LeaseHeldError, match="convmae shard"),
            hold_lease(Storage(), str(tmp_path), "x", on_wait=lambda _: None),
        ):
            pytest.fail("held by two")


@pytest.mark.parametrize("change", [{"boot": "another"}, {"namespace": "4:1"}])
@pytest.mark.parametrize("pid", [os.getpid(), 4_194_399], ids=["ours", "above-the-largest-of-Linux"])
def test_the_silence_of_a_holder_that_cannot_be_seen_decides(tmp_path: Path, change: dict[str, str], pid: int) -> None:
    content = asdict(Holder.here("convmae shard"))
    content["process"] |= {"pid": pid, **change}
    (tmp_path / "claim-000001.json").write_text(json.dumps(content))
    clock = Clock()

    with hold_lease(Storage(), str(tmp_path), "x", on_wait=lambda _: None, clock=clock, sleep=clock.sleep):
        assert 30 <= clock.now < 35


def test_a_holder_whose_pid_another_process_has_now_is_dead_at_once(tmp_path: Path) -> None:
    content = asdict(Holder.here("convmae shard"))
    content["process"]["started"] -= 1
    (tmp_path / "claim-000001.json").write_text(json.dumps(content))

    with hold_lease(Storage(), str(tmp_path), "x", on_wait=no_wait, sleep=lambda _: pytest.fail("waited")):
        pass


def test_a_lease_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    flat = {"token": "t", "work": "drives the run", "user": "u", "host": "h", "since": "2026", "beat": 3}
    content = {**flat, "boot_seconds": 1.0, "pid": 7, "process_seconds": 2.0, "age_seconds": 5.0, "over": False}
    (tmp_path / "claim-000001.json").write_text(json.dumps(content))

    ruler = current_lease(Storage(), str(tmp_path))

    assert ruler is not None and ruler.text == "u@h (process 7, drives the run, since 2026); the lease is 5 s old"


def test_of_many_that_see_a_dead_holder_exactly_one_takes_over(tmp_path: Path) -> None:
    holder_elsewhere(tmp_path)
    start, held, refused = threading.Barrier(8), [], []

    def contend() -> None:
        start.wait()
        clock = Clock(lambda now: time.sleep(0.02))  # slower than a beat, also on a busy machine
        try:
            with hold_lease(
                Storage(), str(tmp_path), "x", on_wait=lambda _: None, dead_seconds=6, clock=clock, sleep=clock.sleep
            ) as lease:
                held.append(lease)
                time.sleep(1.0)
                lease.check()
        except LeaseHeldError as error:
            refused.append(error)

    def beat_fast() -> None:
        while len(refused) < 7 and not done.is_set():
            for lease in list(held):
                lease.beat()
            time.sleep(0.002)

    done = threading.Event()
    beats = threading.Thread(target=beat_fast)
    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in (beats, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    beats.join()

    assert len(held) == 1
    assert len(refused) == 7


def test_a_holder_that_slept_too_long_finds_that_it_lost_its_lease(tmp_path: Path) -> None:
    with hold_lease(Storage(), str(tmp_path), "x", on_wait=no_wait) as lease:
        theirs = holder_elsewhere(tmp_path, number=2)
        lease.beat()
        with pytest.raises(LeaseHeldError, match=f"taken over by .*{ELSEWHERE}"):
            lease.check()

    assert theirs.exists()


@dataclass(frozen=True)
class Refusing(Storage):
    """A store that lists, and while `refuses` is set does not let itself be read."""

    refuses: threading.Event = field(default_factory=threading.Event, compare=False)

    def read(self, url: str) -> bytes:
        if self.refuses.is_set():
            raise CredentialsError("credentials", "must be accepted by the storage", url, "renew them")
        return super().read(url)


def test_a_store_that_refuses_a_beat_takes_no_lease_away(tmp_path: Path) -> None:
    store = Refusing()
    with hold_lease(store, str(tmp_path), "x", on_wait=no_wait) as lease:
        store.refuses.set()
        with pytest.raises(CredentialsError):
            lease.beat()
        lease.check()
        with pytest.raises(CredentialsError), hold_lease(store, str(tmp_path), "y", on_wait=no_wait):
            pytest.fail("held by two")
        store.refuses.clear()
        lease.beat()
        lease.check()


def test_a_lease_beats(tmp_path: Path) -> None:
    with hold_lease(Storage(), str(tmp_path), "x", on_wait=no_wait, beat_seconds=0.01):
        deadline = time.monotonic() + 10
        beats: set[int] = set()
        while len(beats) < 3 and time.monotonic() < deadline:
            beats.add(json.loads((tmp_path / "claim-000001.json").read_text()).get("beat", 0))

    assert len(beats) >= 3


def test_only_one_creates_a_file(tmp_path: Path) -> None:
    outcomes: list[bool] = []
    start = threading.Barrier(16)

    def create(number: int) -> None:
        start.wait()
        outcomes.append(Storage().create(str(tmp_path / "new" / "x"), b"%d" % number))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == [False] * 15 + [True]
    assert Storage().create(str(tmp_path / "new" / "x"), b"later") is False


def test_a_number_that_is_kept_makes_the_next_one_higher_and_delays_no_process(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        with hold_lease(Storage(), str(tmp_path), "x", on_wait=no_wait, keeps_number=True) as lease:
            assert lease.number == number
        (left,) = tmp_path.iterdir()
        assert left.name == f"claim-{number:06d}.json"
    ruler = current_lease(Storage(), str(tmp_path))
    assert ruler is not None and ruler.is_over and ruler.number == 3


def test_the_holder_can_be_looked_up_without_watching(tmp_path: Path) -> None:
    assert current_lease(Storage(), str(tmp_path)) is None
    with hold_lease(Storage(), str(tmp_path), "convmae shard", on_wait=no_wait) as lease:
        time.sleep(0.3)
        lease.beat()
        ruler = current_lease(Storage(), str(tmp_path))

    assert ruler is not None and ruler.holder == lease.holder and not ruler.is_over
    assert 0.3 <= ruler.age_seconds < 10
    assert ruler.text == f"{lease.holder.text}; the lease is {ruler.age_seconds:.0f} s old"
