from __future__ import annotations

import errno
import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.host.local_files import umask_here, write_new


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
@pytest.mark.parametrize("proc", [Path("/proc"), Path("/nonexistent")])
def test_the_umask_is_found_and_stays(umask: int, proc: Path) -> None:
    before = os.umask(umask)
    try:
        assert umask_here(proc) == umask
    finally:
        assert os.umask(before) == umask


def test_a_new_file_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    data, seen = os.urandom(1 << 16), set()
    files = [tmp_path / f"{number}" for number in range(300)]
    writing = threading.Thread(target=lambda: [write_new(file, data) for file in files])

    writing.start()
    for file in files:
        while not file.exists():
            pass
        seen.add(file.read_bytes())
    writing.join()

    assert seen == {data}
    assert sorted(tmp_path.iterdir()) == sorted(files), "nothing else is left"


def test_a_new_file_replaces_nothing(tmp_path: Path) -> None:
    write_new(tmp_path / "deep" / "file", b"first")

    with pytest.raises(FileExistsError):
        write_new(tmp_path / "deep" / "file", b"second")

    assert {path.name: path.read_bytes() for path in (tmp_path / "deep").iterdir()} == {"file": b"first"}


def test_a_writer_that_dies_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", dies)
    with pytest.raises(KeyboardInterrupt):
        write_new(tmp_path / "file", b"data")

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuses(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuses)
    write_new(tmp_path / "file", b"data")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "file", b"other")

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"data"}


def test_without_hard_links_a_full_disk_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuses(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def opened(path: Path, mode: str = "r") -> Any:
        if mode != "xb":
            return real_open(path, mode)
        path.touch(exist_ok=False)
        return Full()

    real_open = Path.open
    monkeypatch.setattr(os, "link", refuses)
    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match="No space left"):
        write_new(tmp_path / "file", b"data")

    assert not list(tmp_path.iterdir())
