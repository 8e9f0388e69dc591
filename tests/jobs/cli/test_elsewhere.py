"""Where a command runs, here or as a job on the cluster, and the words with which it is run there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from jobs.cli import main
from jobs.cli.elsewhere import arguments, refuse_own_path
from jobs.cluster.session import Session
from jobs.remote import command as remote_command
from pipeline.errors import UserError

HTTP = "http://127.0.0.1:9"


def parsed(words: list[str]) -> tuple[Any, dict[str, Any]]:
    """A command's context, and its parameters as Typer parses the words."""
    group: Any = get_command(main.app)
    command = group.commands[words[0]]
    context = command.make_context(words[0], words[1:])
    return context, context.params


@pytest.mark.parametrize(
    "words",
    [
        ["shard", "s3://b/in", "s3://b/out", "--samples-per-shard", "16", "--salvage"],
        ["verify", "s3://b/out", "--deep", "--json"],
        ["pretrain", "tiny", "data=s3://b/d", "model.depth=[1, 1, 1]", "--run", "a b", "--strict"],
        ["consolidate", "first", "--step", "400", "--dtype", "bf16", "--force"],
        ["status", "first", "-w"],
        ["shard", "--", "-odd-name", "s3://b/--out"],
        ["list"],
        ["evaluate", "first", "--data", "s3://b/d", "--k", "3", "--k", "5", "--json", "-", "--l2", "0.5"],
        ["embed", "s3://b/d", "s3://b/f.npz", "seed=3", "--weights", "random", "--recipe", "tiny"],
        ["reconstruct", "s3://b/1.jpg", "s3://b/2.jpg", "--weights", "first", "--out", "s3://b/x.png", "--seed", "4"],
    ],
)
def test_the_words_that_are_sent_mean_what_was_typed(words: list[str]) -> None:
    context, parameters = parsed(words)

    there = arguments(context, parameters)

    assert there[0] == words[0]
    assert parsed(there)[1] == parameters


def test_a_path_of_this_machine_is_refused_and_one_that_is_not_here_may_be_the_clusters(tmp_path: Path) -> None:
    for own in ("photos", "./photos", str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(UserError, match="source: must be a place that the cluster's nodes reach"):
            refuse_own_path("source", own)
    refuse_own_path("source", "/mnt/shared-by-all-nodes/photos")
    refuse_own_path("source", "s3://b/photos")
    refuse_own_path("source", "")


class SentError(Exception):
    """A command was sent to the cluster."""


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Types a command on a laptop; returns the words that would run on the cluster, or None if it runs here."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("CONVMAE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_ADDRESS", HTTP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jobs.cli.main.sys.argv", ["convmae"])

    def asked(_: Session, words: list[str], *, files: dict[str, str], run_root: str) -> int:
        raise SentError(words, files, run_root)

    monkeypatch.setattr(remote_command, "run_there", asked)

    def typed(*words: str) -> Any:
        try:
            get_command(main.app)(list(words), standalone_mode=False)
        except SentError as told:
            return told.args
        return None

    return typed


def test_commands_that_need_the_cluster_are_sent_there_with_or_without_credentials(
    sent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, _, _ = sent("verify", "s3://b/data", "--deep")
    assert words == ["verify", "--deep", "--", "s3://b/data"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    assert sent("shard", "s3://b/in", "s3://b/out")[0] == ["shard", "--", "s3://b/in", "s3://b/out"]


def test_commands_that_need_the_store_are_sent_there_only_without_credentials(
    sent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sent("status", "first", "--run-root", "s3://b/runs")[2] == "s3://b/runs"
    assert sent("order", "s3://b/d", "--batch", "8", "--lanes", "2")[0][0] == "order"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", HTTP)
    with pytest.raises(UserError, match="storage"):
        sent("status", "first", "--run-root", "s3://b/runs")


def test_commands_on_local_folders_run_here(sent: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run: must exist"):
        sent("status", "first", "--run-root", str(tmp_path / "runs"))


def test_a_recipe_file_is_sent_along_and_a_bad_one_is_refused_here(sent: Any, tmp_path: Path) -> None:
    recipe = 'base = "tiny"\nepochs = 3\n'
    (tmp_path / "mine.toml").write_text(recipe)
    words, files, _ = sent("pretrain", str(tmp_path / "mine.toml"), "data=s3://b/d", "run_root=s3://b/runs")

    assert words == ["pretrain", "--", "mine.toml", "data=s3://b/d", "run_root=s3://b/runs"]
    assert files == {"mine.toml": recipe}
    with pytest.raises(UserError, match=r"epoch.*did you mean"):
        sent("pretrain", "tiny", "epoch=3")
    with pytest.raises(UserError, match="data: must be a place that the cluster's nodes reach"):
        sent("pretrain", "tiny", f"data={tmp_path}")


def test_a_recipe_is_inspected_there_by_its_name_or_its_file(sent: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "tiny"\n')

    assert sent("inspect", "tiny", "data=s3://b/d")[0] == ["inspect", "--", "tiny", "data=s3://b/d"]
    words, files, _ = sent("inspect", "mine.toml", "data=s3://b/d")
    assert words == ["inspect", "--", "mine.toml", "data=s3://b/d"] and set(files) == {"mine.toml"}
    assert sent("inspect", "s3://b/d")[0] == ["inspect", "--", "s3://b/d"]


def test_an_evaluation_is_sent_there_with_places_that_the_cluster_reaches(sent: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "tiny"\n')
    (tmp_path / "mine.pth").write_bytes(b"weights")
    there = ["--data=s3://b/d", "--run-root=s3://b/runs"]

    assert sent("evaluate", "first@5", *there, "--json", "-")[0] == [
        "evaluate", there[0], "--json=-", there[1], "--", "first@5"
    ]  # fmt: skip
    words, files, _ = sent("evaluate", "random", "--recipe", "mine.toml", *there)
    assert words == ["evaluate", there[0], "--recipe=mine.toml", there[1], "--", "random"]
    assert set(files) == {"mine.toml"}
    assert sent("reconstruct", "s3://b/1.jpg", "--weights", "first", "--out", "s3://b/x.png", there[1])
    for own in (
        ("evaluate", "first", "--data", str(tmp_path)),
        ("evaluate", "first", *there, "--page", "page.html"),
        ("evaluate", "first", *there, "--json", str(tmp_path / "mine.pth")),
        ("embed", "s3://b/d", "out.npz", "--weights", "first"),
        ("reconstruct", "mine.pth", "--weights", "s3://b/w.safetensors", "--out", "s3://b/x.png", there[1]),
    ):
        with pytest.raises(UserError, match="must be a place that the cluster's nodes reach"):
            sent(*own)
    with pytest.raises(UserError, match="what: must mean the same on the cluster as here"):
        sent("evaluate", "mine.pth", *there)


@pytest.mark.parametrize("words", [("submit", "tiny", "data=s3://b/d"), ("resume", "first")])
def test_the_address_of_a_webhook_is_in_no_command_line(sent: Any, words: tuple[str, ...]) -> None:
    there = [*words, "--run-root=s3://b/runs"] if words[0] == "resume" else [*words, "run_root=s3://b/runs"]
    with pytest.raises(UserError, match=r"notify_url: must be env:NAME") as refused:
        sent(*there, "notify_url=https://hooks.slack.com/s3cr3t")
    assert "s3cr3t" not in str(refused.value)

    assert "notify_url=env:CONVMAE_NOTIFY_URL" in sent(*there, "notify_url=env:CONVMAE_NOTIFY_URL")[0]


def test_verbose_may_be_given_anywhere() -> None:
    assert main.verbose_first(["list", "--verbose", "--json"]) == ["--verbose", "list", "--json"]
    assert main.verbose_first(["shard", "--", "--verbose"]) == ["shard", "--", "--verbose"]
    assert main.verbose_first(["list"]) == ["list"]


def test_every_command_that_takes_a_run_can_be_sent_there() -> None:
    group: Any = get_command(main.app)
    here = {"up", "down", "demo", "drive", "ui"}
    for name, command in group.commands.items():
        takes_context = any("ctx" in str(parameter) for parameter in typing_names(command.callback))
        assert name in here or type(command).__name__ == "Elsewhere" or takes_context, name


def typing_names(callback: Any) -> list[str]:
    inner = getattr(callback, "__wrapped__", callback)
    return [name for name, kind in inner.__annotations__.items() if kind in ("typer.Context", typer.Context)]


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "tiny", "data=s3://b/d", "run_root=s3://b/runs", "cache_dir=cache"],
        ["pretrain", "tiny", "data=s3://b/d", "run_root=s3://b/runs", "cache_dir=~/cache"],
        ["pretrain", "{toml}", "run_root=s3://b/runs"],
        ["diff", "s3://b/runs/first", "runs/second"],
    ],
)
def test_paths_that_depend_on_the_current_folder_are_refused(sent: Any, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "mine.toml").write_text('base = "tiny"\ndata = "datasets/mine"\n')

    with pytest.raises(UserError, match=r"must mean the same on the cluster as here.*an absolute path"):
        sent(*(word.format(toml=tmp_path / "mine.toml") for word in words))
