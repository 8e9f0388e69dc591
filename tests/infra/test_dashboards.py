from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from panel_queries import GPU, NODE, boards, legends, panel_queries
from probe_events import probe_events
from prometheus_client import CollectorRegistry, Gauge, start_http_server
from prometheus_server import PROMETHEUS, asked, prometheus, wait_for_series

from infra.grafana.boards import BOARDS
from infra.grafana.build import FOLDER, board_json
from jobs.metrics.exporter import COUNTERS, GAUGES, RunExporter
from jobs.metrics.rank_figures import RankFigures
from jobs.run.probe_rows import ProbeCurve

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "tests" / "schemas" / "grafana"
DCGM_GAUGES = (
    "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_DEV_SM_CLOCK",
    "DCGM_FI_DEV_MEM_CLOCK",
    "DCGM_FI_DEV_MEM_COPY_UTIL",
    "DCGM_FI_DEV_MEMORY_TEMP",
    "DCGM_FI_DEV_GPU_TEMP",
    "DCGM_FI_DEV_POWER_USAGE",
    "DCGM_FI_DEV_XID_ERRORS",
    "DCGM_FI_DEV_FB_FREE",
    "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE",
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
    "DCGM_FI_PROF_DRAM_ACTIVE",
)
"""Among those that dcgm-exporter 4.8.2 serves for each GPU by default (its etc/default-counters.csv)."""


def schema_errors(name: str, definition: str, value: Any) -> list[str]:
    """Where `value` violates a definition of one of Grafana's schemas."""
    schema = json.loads((SCHEMAS / f"{name}.jsonschema.json").read_text())
    validator = Draft7Validator({**schema, "$ref": f"#/definitions/{definition}"})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def board_errors(board: Any) -> list[str]:
    """Where a dashboard violates the schemas of Grafana 11.6: its own, its panels' and their queries'."""
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
def test_a_board_satisfies_grafanas_schema(name: str) -> None:
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
def test_the_schema_detects_what_is_wrong(place: tuple[Any, ...], value: Any) -> None:
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
    """A Prometheus with our rules; it scrapes the real exporter, with a value in every series, and two nodes' GPUs."""
    exporter = RunExporter("first", "127.0.0.1", 0)
    exporter.update(dict.fromkeys(GAUGES, 1.0))
    exporter.update_ranks([RankFigures(step_seconds=600.0), RankFigures(step_seconds=600.0)])
    exporter.probed(ProbeCurve.of(probe_events({0: 0.25, 8: 0.5})))
    for name in COUNTERS:
        exporter.count(name, 1)
    rules = ROOT / "infra" / "prometheus" / "convmae.rules.yml"
    gpus = [serve_gpus("Hostname", "node-a"), serve_gpus("hostname", "node-b")]
    with prometheus(tmp_path_factory.mktemp("prometheus"), rules, exporter.address, *gpus) as url:
        wait_for_series(url, "count(convmae:checkpoint_stall:ratio1h)")
        wait_for_series(url, f"count({DCGM_GAUGES[0]}) == 4")
        yield url


def serve_gpus(host_label: str, host: str) -> str:
    """Address of a stand-in for DCGM's exporter with its default gauges of two GPUs; the case of one label changed."""
    registry = CollectorRegistry()
    labels = ("gpu", "UUID", "pci_bus_id", "device", "modelName", host_label)
    for name in DCGM_GAUGES:
        gauge = Gauge(name, "as by default", labels, registry=registry)
        for gpu in ("0", "1"):
            gauge.labels(gpu, f"GPU-{host}-{gpu}", f"00000000:0{gpu}:00.0", f"nvidia{gpu}", "NVIDIA H100", host).set(
                0.5
            )
    server, _ = start_http_server(0, addr="127.0.0.1", registry=registry)
    return f"127.0.0.1:{server.server_port}"


@pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed")
@pytest.mark.parametrize(("query", "legend"), panel_queries())
def test_a_panels_query_has_an_answer_and_its_lines_have_names(server: str, query: str, legend: str) -> None:
    """Those of Ray's own series are only parsed here; a slow test asks them of a cluster."""
    found = asked(server, query)

    if NODE not in query:
        assert found, f"no series answers {query}"
        named = legends(legend, found)
        assert len(set(named)) == len(named), f"two lines have one name: {named}"
    if GPU in query:
        assert sorted(legends(legend, found)) == [f"node-{node} GPU {gpu}" for node in "ab" for gpu in "01"]


@pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed")
def test_a_query_that_does_not_parse_is_refused(server: str) -> None:
    with pytest.raises(ValueError, match="parse error"):
        asked(server, "rate(convmae_images_total[5m)")
