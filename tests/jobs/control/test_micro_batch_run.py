"""`micro_batch_size=auto` in real runs: it is found on a worker before the first step, and kept with the run."""

from __future__ import annotations

import re

import pytest
from patience import wait_until
from testbed import Command, losses, small_recipe

pytestmark = pytest.mark.slow


def fields(steps: int) -> dict[str, object]:
    return {"micro_batch_size": "auto", "grain_size": "auto", "max_steps": steps}


def test_it_is_found_once_and_the_run_resumes_with_it(convmae: Command, data: str) -> None:
    out, err = convmae("pretrain", *small_recipe(data, **fields(2)), "--run", "fitted")

    run = convmae.run("fitted")
    (found,) = re.findall(r"micro_batch_size = (\d+): ", out + err)
    assert run.read_recipe().micro_batch_size == int(found) > 0
    assert len(losses(run)) == 2

    out, err = convmae("pretrain", *small_recipe(data, **fields(4)), "--run", "fitted")
    assert "micro_batch_size = " not in out + err
    assert run.read_recipe().micro_batch_size == int(found)
    assert len(losses(run)) == 4


def test_a_submitted_run_finds_it_on_the_cluster(convmae: Command, data: str) -> None:
    convmae("submit", *small_recipe(data, **fields(3)), "--run", "fitted-there")

    run = convmae.run("fitted-there")
    wait_until("the end", lambda: run.read_heartbeat().get("state") == "finished", 300)
    assert run.read_recipe().micro_batch_size > 0
    assert len(losses(run)) == 3
