from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from panel_queries import GPU, NODE, boards, panel_queries
from prometheus_server import PROMETHEUS, asked, prometheus, wait_for_series

from infra.grafana.boards import BOARDS
from infra.grafana.build import FOLDER, board_json
from jobs.exporter import COUNTERS, RunExporter, status_keys
from jobs.rank_figures import RankFigures

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "tests" / "schemas" / "grafana"


def schema_errors(name: str, definition: str, value: Any) -> list[str]:
    """Where `value` breaks a definition of one of Grafana's schemas."""
    schema = json.loads((SCHEMAS / f"{name}.jsonschema.json").read_text())
    validator = Draft7Validator({**schema, "$ref": f"#/definitions/{definition}"})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def board_errors(board: Any) -> list[str]:
    """Where a dashboard breaks the schemas of Grafana 11.6: its own, its panels' and their queries'."""
    errors = schema_errors("dashboard", "Dashboard", board)
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            errors += schema_errors("prometheus", "dataquery", target)
        if panel["type"] == "timeseries":
            errors += schema_errors("timeseries", "Options", panel["options"])
            errors += schema_errors("timeseries", "FieldConfig", panel["fieldConfig"]["defaults"]["custom"])
        elif panel["type"] == "stat":
            errors += schema_errors("stat", "Options", panel["options"])
    return errors


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_the_checked_in_file_is_what_the_builders_make(board: Any) -> None:
    remedy = "run `python -m infra.grafana.build`"
    assert (FOLDER / f"{board.uid}.json").read_text() == board_json(board), remedy


def test_there_is_no_file_without_a_builder() -> None:
    assert set(boards()) == {board.uid for board in BOARDS}


@pytest.mark.parametrize("name", boards())
def test_a_board_keeps_grafanas_schema(name: str) -> None:
    assert board_errors(boards()[name]) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schemaVersion",), "41"),
        (("graphTooltip",), 7),
        (("panels", 1, "gridPos", "w"), "wide"),
        (("panels", 1, "targets", 0, "exprr"), "up"),
        (("panels", 1, "options", "colorMode"), "loud"),
        (("colour",), "red"),
    ],
)
def test_the_schema_finds_what_is_wrong(place: tuple[Any, ...], value: Any) -> None:
    board: Any = boards()["convmae-overview"]
    *path, last = place
    part = board
    for step in path:
        part = part[step]
    part[last] = value

    assert board_errors(board)


@pytest.mark.parametrize("name", boards())
def test_panels_have_identities_titles_and_explanations_and_do_not_overlap(name: str) -> None:
    panels = boards()[name]["panels"]
    taken: set[tuple[int, int]] = set()

    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"].endswith(".")
            assert panel["targets"]
            assert panel["datasource"]["uid"] == "${source}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus with our rules that scrapes the real exporter, which has a value in every series."""
    exporter = RunExporter("first", "127.0.0.1", 0)
    exporter.update(dict.fromkeys(status_keys(), 1.0))
    exporter.update_ranks([RankFigures(step_seconds=600.0), RankFigures(step_seconds=600.0)])
    for name in COUNTERS:
        exporter.count(name, 1)
    rules = ROOT / "infra" / "prometheus" / "convmae.rules.yml"
    with prometheus(tmp_path_factory.mktemp("prometheus"), exporter.address, rules) as url:
        wait_for_series(url, "count(convmae:checkpoint_stall:ratio1h)")
        yield url


@pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed")
@pytest.mark.parametrize("query", panel_queries())
def test_a_panels_query_has_an_answer(server: str, query: str) -> None:
    """GPU panels, and those of Ray's own series, are only parsed here; a slow test asks the latter of a cluster."""
    found = asked(server, query)

    if GPU not in query and NODE not in query:
        assert found, f"no series answers {query}"


@pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed")
def test_a_query_that_does_not_parse_is_refused(server: str) -> None:
    with pytest.raises(ValueError, match="parse error"):
        asked(server, "rate(convmae_images_total[5m)")
