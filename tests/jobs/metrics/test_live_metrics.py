"""A run that loses a worker, as Prometheus sees it: the basis of dashboards and alerts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from labelled_data import labelled_dataset
from panel_queries import GPU, legends, panel_queries
from patience import wait_until
from prometheus_server import PROMETHEUS, asked, wait_for_series
from testbed import Command, ranks, small_recipe

from jobs.stack.record import Stack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed"),
]


ACCURACIES = {"probed": "convmae_probe_", "tuned": "convmae_validation_"}
"""Series of runs with labelled data, by the names of such runs here."""


@pytest.fixture(scope="module")
def live(convmae: Command, data: str, local_stack: Stack) -> Iterator[tuple[str, str]]:
    """Name of a run of two workers that trains, and the URL of the Prometheus that scrapes it."""
    name, url = "watched", local_stack.prometheus_url
    assert url
    convmae("submit", *small_recipe(data, epochs=5000, warmup_epochs=1.0, checkpoint_every_steps=20), "--run", name)
    run = convmae.run(name)
    wait_until("a checkpoint", lambda: bool(run.read_heartbeat().get("checkpoint_at_seconds")), 300)
    wait_for_series(url, f'convmae:images:rate5m{{run="{name}"}} > 0', 120)
    wait_for_series(url, f'convmae:checkpoint_stall:ratio1h{{run="{name}"}}', 60)
    wait_for_series(url, f'convmae:checkpoint_age:seconds{{run="{name}"}}', 60)  # scraped, then evaluated
    wait_for_series(url, "ray_node_mem_used", 120)
    yield name, url
    convmae("stop", name)


@pytest.mark.parametrize(("query", "legend"), panel_queries())
def test_a_live_run_answers_every_panel(live: tuple[str, str], query: str, legend: str) -> None:
    """Except those of accuracies, which other runs have, and of GPUs, which are only parsed."""
    if GPU in query or any(series in query for series in ACCURACIES.values()):
        asked(live[1], query)
    else:
        answered(live[1], query, legend)


def answered(url: str, query: str, legend: str) -> None:
    found = asked(url, query)
    assert found, f"no series answers {query}"
    named = legends(legend, found)
    assert len(set(named)) == len(named), f"two lines have one name: {named}"


def test_runs_that_measure_accuracies_answer_their_panels(convmae: Command, local_stack: Stack, tmp_path: Path) -> None:
    url = local_stack.prometheus_url
    assert url
    classes = {f"class-{number}": 15 for number in range(6)}  # the correct one among five of them
    data = labelled_dataset(tmp_path, classes).url
    convmae("submit", *small_recipe(data, epochs=1, warmup_epochs=0.5), "--run", "pre", "--follow")
    tuning = small_recipe(data, **{"epochs": 5000, "finetune.validate_epochs": 1})[1:]
    for name, command in {
        "probed": ("submit", *small_recipe(data, epochs=5000, probes=True, probe_epochs=1)),
        "tuned": ("finetune", "tiny_finetune", *tuning, "--from", "pre"),
    }.items():
        convmae(*command, "--run", name)
        queries = [found.values for found in panel_queries() if ACCURACIES[name] in found.values[0]]
        assert queries
        for query, _ in queries:
            wait_for_series(url, query, 480)
        for query, legend in queries:
            answered(url, query, legend)
        convmae("stop", name)


def test_a_worker_that_dies_leaves_no_series_and_resets_no_counter(
    convmae: Command, live: tuple[str, str], local_stack: Stack
) -> None:
    name, url = live
    run = convmae.run(name)
    images = float(asked(url, f'convmae_images_total{{run="{name}"}}')[0]["value"][1])

    ranks(local_stack)[0].kill()
    killed_at = time.monotonic()
    wait_until("the restart", lambda: run.read_heartbeat().get("attempt") == 2, 300)
    wait_for_series(url, f'convmae_restarts_total{{run="{name}", reason="restart"}} == 1', 60)
    wait_for_series(url, f'convmae_images_total{{run="{name}"}} > {images}', 60)

    assert not asked(url, f'resets(convmae_images_total{{run="{name}"}}[10m]) > 0')
    assert float(asked(url, f'sum(convmae_failures_total{{run="{name}"}})')[0]["value"][1]) == 1
    wait_until("half a minute", lambda: time.monotonic() > killed_at + 30, 40)
    told = {row["metric"]["rank"] for row in asked(url, f'convmae_rank_step_seconds{{run="{name}"}}')}
    now = asked(url, f'convmae_world_size_ranks{{run="{name}"}}')
    assert len(told) in (0, int(now[0]["value"][1]))  # those of the new group, or none if it is just starting
