"""The picture of the dashboards, drawn from a Prometheus that answers as the real one does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image

from infra.grafana.draw import SHOWN, draw, graph_of, lines, run_span

END = 1_700_000_000.0
POINTS = [[END - 60 + 5 * number, str(number)] for number in range(13)]


class Answers(BaseHTTPRequestHandler):
    """A Prometheus that knows the run `first`, and answers each query with one series."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)["query"][0]
        type(self).asked.append(query)
        metric = {"run": "first", "rank": "3"}
        known = "first" in query
        series = (
            {"metric": metric, "value": [END, str(END)]}
            if parts.path.endswith("/query")
            else {"metric": metric, "values": POINTS}
        )
        body = json.dumps({"data": {"result": [series] if known else []}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Answers.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_panel_is_drawn_for_only_the_run(url: str, tmp_path: Path) -> None:
    draw(url, "first", str(tmp_path / "panels.png"))

    with Image.open(tmp_path / "panels.png") as picture:
        assert picture.width > 1000
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10  # not one colour
    wanted = {query.expression for board, title in SHOWN for query in graph_of(board, title).queries}
    filled = {query.replace("$run", "first").replace("$__rate_interval", "60s") for query in wanted}
    assert filled <= set(Answers.asked)


def test_series_are_named_as_on_the_dashboard_and_begin_with_the_run(url: str) -> None:
    span = run_span(url, "first")
    board, title = SHOWN[-1]

    (line,) = lines(url, "first", graph_of(board, title), span)

    assert span == (END - 60, END)
    assert line.name == "first rank 3"
    assert (line.minutes[0], line.minutes[-1]) == (0.0, 1.0)
    assert line.values[-1] == 12.0


def test_a_run_that_prometheus_does_not_know_is_reported(url: str) -> None:
    with pytest.raises(ValueError, match="no run other"):
        run_span(url, "other")
