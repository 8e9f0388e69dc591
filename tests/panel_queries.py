"""The queries of the checked-in dashboards, as Grafana would send them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "infra" / "grafana" / "dashboards"
GPU = "DCGM_"
"""Series of NVIDIA's exporter."""
NODE = "ray_"


def boards() -> dict[str, Any]:
    """Each dashboard by the name of its file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def panel_queries() -> list[Any]:
    """Each query of each panel and its legend, for `pytest.mark.parametrize`, with variables filled in for all runs."""
    queries = []
    for name, board in boards().items():
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                query = target["expr"].replace("$run", ".*").replace("$__rate_interval", "1m")
                assert "$" not in query, f"a variable that no test fills: {query}"
                queries.append(pytest.param(query, target["legendFormat"], id=f"{name}-{panel['id']}{target['refId']}"))
    return queries


def legends(legend: str, found: list[dict[str, Any]]) -> list[str]:
    """What Grafana writes below a graph for the series found; a label that one lacks is empty."""
    return [_filled(legend, series["metric"]) for series in found]


def _filled(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), legend)
