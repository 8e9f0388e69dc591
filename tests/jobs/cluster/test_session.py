from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cluster.session import JOB_VARIABLE, Session
from jobs.errors import ClusterError
from jobs.run.own_code import PROJECT
from jobs.run.roots import state_folder
from pipeline.errors import UserError

HTTP = "http://10.0.0.1:8265"


def session(tmp_path: Path, **variables: str) -> Session:
    return Session.open(
        {"CONVMAE_HOME": str(tmp_path / "home"), "XDG_STATE_HOME": str(tmp_path / "state"), **variables}
    )


def test_the_code_is_sent_to_a_cluster_of_other_machines(tmp_path: Path) -> None:
    assert session(tmp_path, RAY_ADDRESS=HTTP).code() == {"working_dir": str(PROJECT)}


def test_a_cluster_named_by_http_takes_only_jobs_except_from_a_job_of_its_own(tmp_path: Path) -> None:
    assert session(tmp_path, RAY_ADDRESS=HTTP).is_away
    assert not session(tmp_path, RAY_ADDRESS=HTTP, **{JOB_VARIABLE: "{}"}).is_away
    assert not session(tmp_path, RAY_ADDRESS="auto").is_away
    assert not session(tmp_path).is_away


def test_an_empty_address_is_none(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="must name a cluster"):
        _ = session(tmp_path, RAY_ADDRESS="").cluster


def test_the_run_root_is_the_given_one_the_variable_or_the_last_used_with_the_cluster(tmp_path: Path) -> None:
    here = session(tmp_path, RAY_ADDRESS=HTTP)
    with pytest.raises(UserError, match=r"none was used with http://10.0.0.1:8265 yet.*CONVMAE_RUN_ROOT"):
        here.run_root()
    here.remember_run_root("s3://bucket/runs")

    assert here.run_root() == "s3://bucket/runs"
    assert session(tmp_path, RAY_ADDRESS=f"{HTTP}/").run_root() == "s3://bucket/runs"
    assert here.run_root("s3://other/runs") == "s3://other/runs"
    assert session(tmp_path, RAY_ADDRESS=HTTP, CONVMAE_RUN_ROOT="s3://mine").run_root() == "s3://mine"
    with pytest.raises(UserError, match="none was used"):
        session(tmp_path, RAY_ADDRESS="http://10.0.0.2:8265").run_root()


@pytest.mark.parametrize("content", ["", "[]", '{"http://10.0.0.1:8265": 7}', "\0"])
def test_damaged_memory_counts_as_none(tmp_path: Path, content: str) -> None:
    here = session(tmp_path, RAY_ADDRESS=HTTP)
    here.remember_run_root("s3://bucket/runs")
    next(state_folder(here.environ).iterdir()).write_text(content)

    with pytest.raises(UserError, match="none was used"):
        here.run_root()
    here.remember_run_root("s3://bucket/runs")
    assert here.run_root() == "s3://bucket/runs"


def test_memory_that_cannot_be_written_fails_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder would be")

    session(tmp_path, RAY_ADDRESS=HTTP).remember_run_root("s3://bucket/runs")


@pytest.mark.parametrize(
    "written", ["{at}/runs/one", "{at}//runs/./one/", "runs/one", "./runs/one/", "file://{at}/runs/one"]
)
def test_a_run_is_found_by_any_path_of_its_directory(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert session(tmp_path).run(written.format(at=tmp_path)).url == f"{tmp_path}/runs/one"


def test_a_run_is_found_from_inside_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")

    assert session(tmp_path).run(".").url == f"{tmp_path}/one"


@pytest.mark.parametrize("written", ["s3://bucket/runs/", "S3A://bucket//runs", "s3n://bucket/runs//"])
def test_a_run_root_has_one_form_wherever_it_comes_from(tmp_path: Path, written: str) -> None:
    by_variable = session(tmp_path, RAY_ADDRESS=HTTP, CONVMAE_RUN_ROOT=written)

    assert by_variable.run_root() == session(tmp_path).run_root(written) == "s3://bucket/runs"
    assert by_variable.run("one").url == session(tmp_path).run(f"{written}/one/").url == "s3://bucket/runs/one"


def test_a_run_root_that_is_not_a_url_is_refused_with_its_origin(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"CONVMAE_RUN_ROOT: must have a known protocol.*did you mean s3"):
        session(tmp_path, CONVMAE_RUN_ROOT="s4://bucket/runs").run_root()
    with pytest.raises(UserError, match="run_root: must name a bucket"):
        session(tmp_path, CONVMAE_RUN_ROOT="s4://bucket/runs").run_root("s3://")


def test_the_word_that_is_shown_for_a_run_finds_it_again(tmp_path: Path) -> None:
    here = session(tmp_path, RAY_ADDRESS=HTTP, CONVMAE_RUN_ROOT="s3://bucket/runs/")

    for run in (here.run("one"), here.run(f"{tmp_path}/runs/one")):
        assert here.run(here.word_for(run)).url == run.url
    assert here.word_for(here.run("one")) == "one"
