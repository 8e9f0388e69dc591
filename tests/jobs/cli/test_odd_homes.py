from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.cluster.session import Session, home_folder
from jobs.run import roots
from jobs.stack import services
from jobs.stack.local_stack import down, up
from jobs.stack.ports import choose
from jobs.stack.record import ServiceRecord, Stack, read_stack
from jobs.stack.services import StackSettings
from pipeline.errors import UserError


@pytest.mark.parametrize("name", ["a,b", "a:b", "100%20", "'q\"", "a;b", "\udcff\udce4", "größe 図", "-dir=x"])
def test_no_service_is_given_a_path_that_it_could_misread(tmp_path: Path, name: str) -> None:
    settings = StackSettings(
        "id", tmp_path / name, Path("/tmp/run"), choose({}), "key", "secret", "internal", 1, "prom"
    )

    for service in settings.service_names:
        assert not [word for word in services.command(service, settings) if name in word]
        assert services.working_folder(service, settings) in (settings.home, Path("/tmp/run/tmp"))


def test_a_stack_with_any_home_is_written_and_read(tmp_path: Path) -> None:
    home = tmp_path / "a,b \udcff'"
    home.mkdir()
    settings = StackSettings("id", home, tmp_path / "run", choose({}), "key", "secret", "internal", 1, None)
    written = Stack(settings, None, {name: ServiceRecord() for name in settings.service_names})
    written.save()

    assert read_stack(home) == written
    assert Stack.load(home) is None


@pytest.mark.parametrize("part", ["x" * 256, "file/below", "loop"])
def test_a_home_that_cannot_be_made_is_refused_and_leaves_nothing(tmp_path: Path, part: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = set(tmp_path.rglob("*"))

    with pytest.raises(UserError, match="CONVMAE_HOME: must be a folder that can be made and written"):
        up(tmp_path / "new" / part if part.startswith("x") else tmp_path / part)

    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": 3}', '{"settings": {"home": 1}}'])
def test_a_damaged_record_of_a_stack_is_refused_wherever_it_is_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "stack.json").write_text(content)

    for work in (up, down, Stack.load, lambda home: Session.open({"CONVMAE_HOME": str(home)})):
        with pytest.raises(UserError, match=r"CONVMAE_HOME: must hold an intact stack\.json"):
            work(tmp_path)
    assert (tmp_path / "stack.json").read_text() == content


def test_a_home_may_begin_with_a_tilde_even_of_no_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    assert home_folder({"CONVMAE_HOME": "~/x"}) == tmp_path / "x"
    assert home_folder({"CONVMAE_HOME": "~nobody-of-that-name/x"}) == Path.cwd() / "~nobody-of-that-name" / "x"


def test_without_home_and_user_name_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    folder = roots.state_folder({})

    roots.remember(folder, "head:1", "s3://bucket/runs")
    assert roots.remembered(folder, "head:1") == ""
    assert roots.state_folder({"XDG_STATE_HOME": os.sep + "state"}) == Path("/state/convmae")
