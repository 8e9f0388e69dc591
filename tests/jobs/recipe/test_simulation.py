"""The simulation against closed forms, and its invariants."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.cli import main
from jobs.recipe import simulation
from jobs.recipe.named_recipes import named_recipe
from jobs.recipe.simulation import (
    POLICIES,
    NoHeadwayError,
    Scenario,
    best_interval_steps,
    daly_interval_seconds,
    mean_outcome,
    prediction_row,
    predictions,
    simulate,
)
from jobs.recipe.sizing import H100_FLOPS_PER_SECOND, NodeType, estimated_step_seconds
from pipeline.errors import UserError

NEVER = 1e15
HOUR = 3600.0

QUIET = Scenario(
    steps=10_000, step_seconds=1.0, nodes=8, min_nodes=1, mtbf_seconds=NEVER, replace_seconds=600.0,
    restart_seconds=60.0, stall_seconds=2.0, interval_steps=100, gpus_per_node=4,
)  # fmt: skip
ROUGH = replace(QUIET, mtbf_seconds=8 * HOUR, replace_seconds=0.0)


def daly_wall_seconds(scenario: Scenario) -> float:
    """Expected wall-clock on all nodes if failed ones are replaced at once (Daly's equation 20): the closed form.

    For whole intervals. Restarts may fail as well.
    """
    mtbf, interval_seconds = scenario.group_mtbf_seconds, scenario.interval_steps * scenario.step_seconds
    per_interval = mtbf * math.expm1((interval_seconds + scenario.stall_seconds) / mtbf)
    return math.exp(scenario.restart_seconds / mtbf) * per_interval * scenario.steps / scenario.interval_steps


@pytest.mark.parametrize("policy", POLICIES)
def test_without_failures_only_the_start_and_the_checkpoints_cost(policy: simulation.Policy) -> None:
    outcome = simulate(QUIET, policy, random.Random(0))

    assert outcome.wall_seconds == pytest.approx(60 + 10_000 + 100 * 2)
    assert outcome.goodput == pytest.approx(10_000 / 10_260)
    assert outcome.gpu_hours == pytest.approx(10_260 * 8 * 4 / 3600)
    assert (outcome.lost_steps, outcome.restarts, outcome.waited_seconds) == (0, 0, 0)


def test_a_last_interval_that_is_not_whole_ends_with_a_checkpoint() -> None:
    outcome = simulate(replace(QUIET, steps=250), "fixed", random.Random(0))

    assert outcome.wall_seconds == pytest.approx(60 + 250 + 3 * 2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"interval_steps": 1000}, {"restart_seconds": 900.0}, {"stall_seconds": 60.0, "mtbf_seconds": 4 * HOUR}],
)
def test_with_nodes_replaced_at_once_it_agrees_with_dalys_closed_form(
    policy: simulation.Policy, changes: dict[str, float]
) -> None:
    scenario = replace(ROUGH, steps=100_000, **changes)

    wall = mean_outcome(scenario, policy, trials=200, seed=0).wall_seconds

    # The closed form counts a restart per failure, not the start of the run.
    assert wall - scenario.restart_seconds == pytest.approx(daly_wall_seconds(scenario), rel=0.02)


def test_dalys_interval_begins_with_youngs_and_costs_least() -> None:
    assert daly_interval_seconds(1.0, 1e8) == pytest.approx(math.sqrt(2e8), rel=1e-3)
    assert daly_interval_seconds(10.0, 3.0) == 3.0
    best = best_interval_steps(ROUGH)
    costs = {steps: daly_wall_seconds(replace(ROUGH, interval_steps=steps)) for steps in (best // 2, best, 2 * best)}
    assert min(costs, key=lambda steps: costs[steps]) == best


def test_the_fixed_policy_waits_as_long_as_replacements_take() -> None:
    """Node-failures over the whole run are many, and rarely overlap: each costs its replacement."""
    scenario = replace(ROUGH, steps=200_000, mtbf_seconds=800 * HOUR, replace_seconds=600.0)

    outcomes = [simulate(scenario, "fixed", random.Random(seed)) for seed in range(50)]

    for outcome in outcomes:
        assert outcome.waited_seconds == pytest.approx(600.0 * outcome.restarts, rel=0.2, abs=1)
    assert sum(outcome.restarts for outcome in outcomes) == pytest.approx(
        sum(outcome.wall_seconds - outcome.waited_seconds for outcome in outcomes) / (100 * HOUR), rel=0.15
    )


def test_the_elastic_policy_trains_on_what_is_left() -> None:
    scenario = replace(ROUGH, steps=100_000, mtbf_seconds=100 * HOUR, replace_seconds=12 * HOUR)

    fixed = mean_outcome(scenario, "fixed", trials=50, seed=0)
    elastic = mean_outcome(scenario, "elastic", trials=50, seed=0)

    assert elastic.wall_seconds < 0.8 * fixed.wall_seconds
    assert elastic.waited_seconds == 0 < fixed.waited_seconds


@given(
    nodes=st.integers(1, 20), mtbf=st.floats(10.0, 1000.0), replaced=st.floats(0, 0.05), restart=st.floats(0, 300),
    stall=st.floats(0, 10), interval=st.integers(1, 500), seed=st.integers(0, 2**32), policy=st.sampled_from(POLICIES),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_run_is_faster_than_one_without_failures(
    nodes: int, mtbf: float, replaced: float, restart: float, stall: float, interval: int, seed: int,
    policy: simulation.Policy,
) -> None:  # fmt: skip
    # A node is there most of the time, else all of them hardly ever are, and the fixed policy makes no headway.
    scenario = Scenario(1000, 1.0, nodes, 1, mtbf * HOUR, replaced * mtbf * HOUR, restart, stall, interval)

    outcome = simulate(scenario, policy, random.Random(seed))

    quiet = simulate(replace(scenario, mtbf_seconds=NEVER), policy, random.Random(0))
    assert outcome.wall_seconds >= quiet.wall_seconds * (1 - 1e-9)
    assert 0 < outcome.goodput <= 1
    assert 0 <= outcome.lost_steps <= interval * (outcome.restarts + 1)
    assert outcome.gpu_hours <= outcome.wall_seconds * nodes / 3600 * (1 + 1e-9)


def test_the_same_numbers_give_the_same_mean() -> None:
    assert mean_outcome(ROUGH, "elastic", trials=5, seed=1) == mean_outcome(ROUGH, "elastic", trials=5, seed=1)
    assert mean_outcome(ROUGH, "elastic", trials=5, seed=1) != mean_outcome(ROUGH, "elastic", trials=5, seed=2)


def test_a_thousand_nodes_for_weeks_take_a_moment() -> None:
    scenario = replace(QUIET, steps=500_000, nodes=1024, min_nodes=512, mtbf_seconds=5000 * HOUR)

    found = predictions(scenario, trials=3, seed=0)

    assert [(item.policy, item.interval_steps) for item in found] == [
        ("fixed", 100), ("fixed", best_interval_steps(scenario)),
        ("elastic", 100), ("elastic", best_interval_steps(scenario)),
    ]  # fmt: skip
    assert all(item.outcome and item.outcome.restarts > 10 for item in found)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_thousand_nodes_agree_with_dalys_closed_form(policy: simulation.Policy) -> None:
    """Any of 1,024 nodes fails every five hours, and is replaced at once."""
    scenario = replace(QUIET, steps=200_000, nodes=1024, mtbf_seconds=5000 * HOUR, replace_seconds=0.0)
    scenario = replace(scenario, restart_seconds=120.0, interval_steps=best_interval_steps(scenario))

    outcome = mean_outcome(scenario, policy, trials=100, seed=0)

    assert outcome.wall_seconds - scenario.restart_seconds == pytest.approx(daly_wall_seconds(scenario), rel=0.005)
    assert 0.95 < outcome.goodput < 1
    assert outcome.restarts == pytest.approx(outcome.wall_seconds / scenario.group_mtbf_seconds, rel=0.1)
    assert outcome.lost_steps / outcome.restarts == pytest.approx(scenario.interval_steps / 2, rel=0.1)


def test_of_a_thousand_nodes_one_that_is_replaced_slowly_stops_all_or_none() -> None:
    scenario = replace(
        QUIET, steps=200_000, nodes=1024, mtbf_seconds=5000 * HOUR, replace_seconds=HOUR, interval_steps=250
    )

    fixed, elastic = (mean_outcome(scenario, policy, trials=20, seed=0) for policy in POLICIES)

    # It waits an hour for each failure, of which there is one in five hours of training.
    assert fixed.goodput == pytest.approx(1 / (1 + HOUR / scenario.group_mtbf_seconds), rel=0.05)
    # Two restarts for each failure, and half an interval.
    assert elastic.goodput == pytest.approx(1 - (2 * 60 + 125) / scenario.group_mtbf_seconds - 2 / 250, rel=0.01)
    assert (elastic.waited_seconds, fixed.lost_steps > 0) == (0, True)


def test_the_command_prints_a_table_or_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["simulate", "convmae_base", "epochs=2", "warmup_epochs=0", "--nodes", "64", "--mtbf-hours", "200"]
    arguments += ["--step-seconds", "1.5", "--replace-minutes", "30", "--trials", "2"]
    monkeypatch.setenv("CONVMAE_HOME", "/nonexistent")

    def said(*more: str) -> str:
        monkeypatch.setattr("sys.argv", ["convmae", *arguments, *more])
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    table, found = said(), json.loads(said("--json"))

    scenario = found["scenarios"]["on-demand"]
    assert scenario["mtbf_seconds"] == 200 * HOUR
    assert found["predictions"][0]["outcome"]["wall_seconds"] > scenario["steps"] * 1.5
    assert {item["policy"] for item in found["predictions"]} == set(POLICIES)
    assert f"{found['predictions'][0]['outcome']['goodput']:.1%}" in table
    assert "by Young and Daly" in table
    by_itself = json.loads(said("checkpoint_interval=auto", "--stall-seconds", "5", "--json"))
    assert by_itself["scenarios"]["on-demand"]["interval_steps"] == pytest.approx(
        math.sqrt(2 * 5 * 200 / 64 * HOUR) / 1.5, rel=0.03
    )
    both = json.loads(said("--spot-mtbf-hours", "24", "--spot-replace-minutes", "60", "--json"))
    assert both["scenarios"]["spot"] == scenario | {"mtbf_seconds": 24 * HOUR, "replace_seconds": HOUR}
    assert [item["market"] for item in both["predictions"]] == ["on-demand"] * 8 + ["spot"] * 8
    spot = both["predictions"][-1]["outcome"]
    assert spot["wall_seconds"] > found["predictions"][-1]["outcome"]["wall_seconds"]
    assert "spot" in said("--spot-mtbf-hours", "24")


def test_the_command_counts_cheaper_epochs_of_small_images(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without failures, checkpoints and restarts GPU-hours are those of the steps."""
    monkeypatch.setenv("CONVMAE_HOME", "/nonexistent")
    arguments = ["simulate", "convmae_base", "epochs=10", "warmup_epochs=0", "--nodes", "2", "--mtbf-hours", "1e9"]
    arguments += ["--step-seconds", "2", "--trials", "1", "--restart-seconds", "0", "--stall-seconds", "0"]

    def said(*more: str) -> str:
        monkeypatch.setattr("sys.argv", ["convmae", *arguments, *more])
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    plain, schedule = json.loads(said("--json")), "resolution_schedule=[[0, 160], [0.7, 224]]"
    found, table = json.loads(said(schedule, "--json")), said(schedule)

    small, large = found["resolutions"]
    assert (small["image_size"], large["image_size"], large["step_seconds"]) == ([160, 160], [224, 224], 2.0)
    assert (small["steps"], large["steps"]) == (7 * 312, 3 * 312)
    hours, expected = (2 * 8 * sum(each["steps"] * each["step_seconds"] for each in these) / 3600
                       for these in (found["resolutions"], plain["resolutions"]))  # fmt: skip
    for one, other in zip(found["predictions"], plain["predictions"], strict=True):
        assert one["outcome"]["gpu_hours"] == pytest.approx(hours)
        assert other["outcome"]["gpu_hours"] == pytest.approx(expected)
    assert plain["resolutions"] == [{"image_size": [224, 224], "steps": 3120, "step_seconds": 2.0}]
    assert 0.6 < hours / expected < 0.7
    assert f"  160x160         2,184 of {small['step_seconds']:.3g} s" in table and " s on average on 2 nodes" in table


def test_a_step_that_was_not_measured_is_estimated_as_in_the_guide() -> None:
    """docs/cluster.md: 4096 images in a step, 23,593 and 87,227 images/s on one node and on four, by EFA."""
    recipe, node = named_recipe("convmae_base"), NodeType(8, H100_FLOPS_PER_SECOND)

    for nodes, images_per_second in ((1, 23_593), (4, 87_227)):
        assert 4096 / estimated_step_seconds(recipe, node, nodes) == pytest.approx(images_per_second, rel=0.005)


def test_a_step_of_images_that_are_masked_four_times_computes_four_times_as_much() -> None:
    recipe, node = named_recipe("fastconvmae_base"), NodeType(8, H100_FLOPS_PER_SECOND)
    reduced = estimated_step_seconds(recipe, NodeType(8, math.inf), 1)
    once = recipe.amended(
        {"model.views": 1, "micro_batch_size": 64, "grain_size": 64, "max_workers": 8}
    )  # as many masks a grain

    four, one = (estimated_step_seconds(each, node, 1) - reduced for each in (recipe, once))

    assert reduced > 0
    assert four == pytest.approx(4 * one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0", "--mtbf-hours", "1"], "--nodes"),
        (["--nodes", "2", "--mtbf-hours", "0"], "--mtbf-hours: must be above 0"),
        (["--nodes", "2", "--mtbf-hours", "1", "--spot-mtbf-hours", "-1"], "--spot-mtbf-hours: must be above 0"),
        (["--nodes", "2", "--mtbf-hours", "1", "--step-seconds", "0"], "step_seconds: must be above 0"),
    ],
)
def test_the_command_refuses_numbers_that_cannot_be(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVMAE_HOME", "/nonexistent")
    monkeypatch.setattr("sys.argv", ["convmae", "simulate", "convmae_base", *arguments])

    with pytest.raises(SystemExit) as ended:
        main.main()

    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_run_without_headway_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "MAX_IDLE_EVENTS", 1000)

    hopeless = replace(ROUGH, mtbf_seconds=60.0, interval_steps=10_000)
    with pytest.raises(NoHeadwayError, match="must let the run make headway"):
        simulate(hopeless, "fixed", random.Random(0))
    assert predictions(hopeless, trials=1, seed=0)[0].outcome is None
    assert prediction_row(predictions(hopeless, trials=1, seed=0)[0])[-1] == "never ends"


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"nodes": 0}, "nodes"), ({"mtbf_seconds": 0.0}, "mtbf_seconds"), ({"restart_seconds": -1.0}, "restart_seconds"),
     ({"min_nodes": 9}, "min_nodes")],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(changes: dict[str, float], field: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(QUIET, **changes)
    assert caught.value.field == field


def test_memory_checkpoints_lose_their_interval_and_no_more() -> None:
    """Half an interval with each failure, as failures come at any time in it."""
    scenario = replace(ROUGH, steps=200_000, interval_steps=2000, mtbf_seconds=80 * HOUR, memory_interval_steps=40)

    stored = mean_outcome(replace(scenario, memory_interval_steps=0), "fixed", trials=20, seed=0)
    held = mean_outcome(scenario, "fixed", trials=20, seed=0)

    assert stored.lost_steps / stored.restarts == pytest.approx(1000, rel=0.15)
    from_store = held.store_restarts / held.restarts
    assert from_store < 0.01
    assert held.lost_steps / held.restarts == pytest.approx(20 + 1000 * from_store, rel=0.3)
    assert held.wall_seconds < stored.wall_seconds
    assert stored.store_restarts == stored.restarts


def test_two_neighbours_that_fail_before_there_are_new_copies_lose_the_memory() -> None:
    """The second failure comes within a restart and an interval, and hits one of two neighbours of seven others."""
    scenario = replace(ROUGH, steps=400_000, mtbf_seconds=4 * HOUR, memory_interval_steps=40)

    outcome = mean_outcome(scenario, "fixed", trials=20, seed=0)

    soon = -math.expm1(-(scenario.restart_seconds + 40) / scenario.group_mtbf_seconds)
    assert outcome.store_restarts / outcome.restarts == pytest.approx(soon * 2 / 7, rel=0.2)


def test_a_node_alone_has_nobody_for_its_copies() -> None:
    scenario = replace(ROUGH, nodes=1, mtbf_seconds=HOUR, memory_interval_steps=10)

    outcome = mean_outcome(scenario, "fixed", trials=5, seed=0)
    without = mean_outcome(replace(scenario, memory_interval_steps=0), "fixed", trials=5, seed=0)

    assert outcome.lost_steps / outcome.restarts == pytest.approx(without.lost_steps / without.restarts, rel=0.3)
