"""Simulation: how long a recipe would take on nodes that fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli.elsewhere import at_store
from jobs.cli.shared import AsJson, Overrides, RecipeName, amended_recipe, open_session
from jobs.terminal import print_json, print_pairs, print_table
from pipeline.errors import UserError

if TYPE_CHECKING:
    from jobs.recipe.recipe import Recipe
    from jobs.recipe.simulation import Prediction, Scenario
    from jobs.recipe.sizing import TimedSteps

app = typer.Typer()


@app.command(cls=at_store())
def simulate(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that the run is given.")],
    mtbf_hours: Annotated[float, typer.Option(help="Mean hours between failures of one on-demand node.")],
    step_seconds: Annotated[
        float | None,
        typer.Option(
            help="Seconds of one step on all nodes, as a short run's history shows; with a resolution_schedule of one "
            "with images of model.image_size. Default: estimated for H100 GPUs."
        ),
    ] = None,
    min_nodes: Annotated[int, typer.Option(min=1, help="Fewest nodes with which an elastic run trains.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs in a node.")] = 8,
    replace_minutes: Annotated[float, typer.Option(help="Minutes until a failed node is replaced.")] = 10.0,
    spot_mtbf_hours: Annotated[
        float | None, typer.Option(help="Mean hours until a spot node is taken back; shows spot nodes, too.")
    ] = None,
    spot_replace_minutes: Annotated[float, typer.Option(help="Minutes until a spot node is replaced.")] = 30.0,
    restart_seconds: Annotated[float, typer.Option(help="Seconds from a failure to the first step after it.")] = 60.0,
    stall_seconds: Annotated[float, typer.Option(help="Seconds for which a checkpoint pauses training.")] = 1.0,
    memory_interval: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Steps between memory checkpoints; 0: none. Default: the recipe's, with `auto` one of --stall-seconds "
            "in 1 % of the time.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Runs to simulate; means are shown.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the failures.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Predict how long a recipe takes on nodes that fail, with a fixed and with an elastic number of workers.

    Shows wall time, goodput, lost steps and GPU hours at the recipe's checkpoint interval and at the best one, with and
    without memory checkpoints, for on-demand nodes and, with --spot-mtbf-hours, for spot nodes. Starts nothing.
    """
    from dataclasses import replace

    from jobs.recipe.checkpoint_interval import IntervalRule
    from jobs.recipe.memory_interval import auto_interval_steps
    from jobs.recipe.simulation import Scenario, predictions
    from jobs.recipe.sizing import mean_step_seconds

    resolved = amended_recipe(recipe, overrides)
    if step_seconds is not None and not step_seconds > 0:
        raise UserError("step_seconds", "must be above 0", step_seconds, "give a larger one")
    timed = _timed_steps(resolved, nodes, gpus_per_node, step_seconds)
    for option, hours in (("--mtbf-hours", mtbf_hours), ("--spot-mtbf-hours", spot_mtbf_hours)):
        if hours is not None and not hours > 0:
            raise UserError(option, "must be above 0", hours, "give a larger one")
    scenario = Scenario(
        steps=sum(each.steps for each in timed),
        step_seconds=mean_step_seconds(timed),
        nodes=nodes,
        min_nodes=min_nodes,
        mtbf_seconds=mtbf_hours * 3600,
        replace_seconds=replace_minutes * 60,
        restart_seconds=restart_seconds,
        stall_seconds=stall_seconds,
        interval_steps=1,  # until the rest has been checked
        gpus_per_node=gpus_per_node,
    )
    held = resolved.memory_checkpoint_every_steps if memory_interval is None else memory_interval
    if held == "auto":
        held = auto_interval_steps(stall_seconds, scenario.step_seconds)
    scenario = replace(scenario, memory_interval_steps=held)
    markets = {"on-demand": scenario}
    if spot_mtbf_hours is not None:
        markets["spot"] = replace(
            scenario, mtbf_seconds=spot_mtbf_hours * 3600, replace_seconds=spot_replace_minutes * 60
        )
    rule = IntervalRule.of(resolved)
    for market, one in markets.items():
        interval = rule.simulated_steps(one.step_seconds, one.stall_seconds, one.group_mtbf_seconds)
        markets[market] = replace(one, interval_steps=interval)
    found = {market: predictions(one, trials=trials, seed=seed) for market, one in markets.items()}
    is_estimate = step_seconds is None
    _print_json(markets, found, timed, is_estimate) if as_json else _print_table(markets, found, timed, is_estimate)


def _print_json(
    markets: Mapping[str, Scenario],
    found: Mapping[str, Sequence[Prediction]],
    timed: Sequence[TimedSteps],
    is_estimate: bool,
) -> None:
    from dataclasses import asdict

    print_json(
        {
            "scenarios": {market: asdict(one) for market, one in markets.items()},
            "resolutions": [
                {
                    "image_size": list(each.resolution.model.image_shape),
                    "steps": each.steps,
                    "step_seconds": each.step_seconds,
                }
                for each in timed
            ],
            "step_seconds_estimated": is_estimate,
            "predictions": [{"market": market, **asdict(one)} for market in found for one in found[market]],
        }
    )


def _print_table(
    markets: Mapping[str, Scenario],
    found: Mapping[str, Sequence[Prediction]],
    timed: Sequence[TimedSteps],
    is_estimate: bool,
) -> None:
    from jobs.recipe.simulation import prediction_row, scenario_lines

    parts = [(each.resolution.text, each.steps, each.step_seconds) for each in timed]
    print_pairs(scenario_lines(markets, parts, is_estimate=is_estimate))
    columns = ("nodes", "policy", "every", "memory", "wall", "goodput", "lost", "restarts", "waiting", "GPU-h")
    print_table(columns, [(market, *prediction_row(one)) for market, ones in found.items() for one in ones])


def _timed_steps(recipe: Recipe, nodes: int, gpus_per_node: int, measured: float | None) -> list[TimedSteps]:
    """Steps of a run by the recipe, by the size of their images."""
    from jobs.finetune.training_size import trained_size
    from jobs.recipe.schedule import Schedule, order_of
    from jobs.recipe.sizing import H100_FLOPS_PER_SECOND, NodeType, timed_steps

    size = trained_size(open_session().storage, recipe)
    schedule = Schedule.of(recipe, order_of(recipe, size.samples).steps_per_epoch)
    return timed_steps(
        recipe,
        NodeType(gpus_per_node, H100_FLOPS_PER_SECOND),
        nodes,
        steps_per_epoch=schedule.steps_per_epoch,
        total_steps=schedule.total_steps,
        measured=measured,
    )
