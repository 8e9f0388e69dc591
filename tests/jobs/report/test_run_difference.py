from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.checkpoint.checkpoint import write_commit
from jobs.checkpoint.commit import CheckpointFile, Commit
from jobs.recipe.differences import is_default, is_placement, recipe_fields
from jobs.recipe.named_recipes import named_recipe, recipe_names
from jobs.report.run_difference import HistoryDifference, RunDifference
from jobs.run.directory import RunDirectory
from jobs.run.step_table import StepTable
from jobs.run.stored_steps import StoredSteps
from pipeline.shard.manifest import Manifest
from pipeline.shard.table import ShardEntry, ShardTable
from pipeline.store.storage import Storage

ROW = {"epoch": 0, "learning_rate": 1e-3, "world_size": 2, "attempt": 1, "loss": 0.5}


def rows(*changed: dict[str, Any], steps: int = 6) -> dict[int, dict[str, Any]]:
    """Of some steps, the last of them as given."""
    plain = [{"step": step, **ROW, "samples": f"64-{step}"} for step in range(1, steps + 1)]
    for row, change in zip(plain[steps - len(changed) :], changed, strict=True):
        row.update(change)
    return {row["step"]: row for row in plain}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoredSteps.blocks, "__defaults__", (2,))


def difference(one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> HistoryDifference:
    return HistoryDifference.of(*(StoredSteps.of([StepTable.of(rows.values())]) for rows in (one, other)))


def run_of(
    folder: Path, name: str, history: dict[int, dict[str, Any]], data: str = "", digest: str = "d1", **fields: Any
) -> RunDirectory:
    """A run of one attempt with a checkpoint after its last step."""
    run = RunDirectory.of(Storage(), str(folder / "runs"), name)
    run.claim(named_recipe("tiny").amended({"data": data, **fields}))
    run.write_history(1, 1, history.values())
    begun = {"at_seconds": 1.0, "attempt": 1, "kind": "start", "step": 0, "world_size": 2, "steps_redone": 0}
    run.write_events(1, [begun])
    last = max(history)
    beat = {"state": "finished", "step": last, "total_steps": last, "updated_at_seconds": 1.0}
    run.write_heartbeat(beat)
    write_commit(
        run,
        Commit(
            step=last, epoch=0, world_size=2, zero_stage=1, precision="fp32", recipe_digest="r", dataset_digest=digest,
            order_version=1, seed=0, attempt=1, created_at_seconds=0.0, milestone=True, counters={},
            versions={"torch": "2.13.0", "git": name}, files=(CheckpointFile("model", 3, 4),),
        ),
    )  # fmt: skip
    return run


def test_equal_histories_have_no_first_step_whatever_their_lengths_and_world_sizes() -> None:
    other = rows(steps=9)
    for row in other.values():
        row |= {"world_size": 7, "attempt": 3, "step_seconds": 0.1}
    one = rows({"digest": "ab"})
    other[6] |= {"digest": "ab"}

    found = difference(one, other)

    assert (found.common_steps, found.digests, found.first_step) == (6, 1, None)
    (line,) = found.lines()
    assert line == "history: the same in all 6 steps that both have; digests of all weights compared: 1"


def test_each_part_of_a_step_has_its_own_first_difference() -> None:
    one = rows({"digest": "ab"}, {}, {"digest": "cd"}, {"samples": "64-x", "digest": "ef"})
    other = rows({"digest": "ab"}, {}, {"digest": "cx", "loss": 0.51}, {"loss": 0.52})

    found = difference(one, other)

    assert [(parting.what, parting.step, parting.values) for parting in found.partings] == [
        ("samples", 6, ("64-x", "64-6")),
        ("loss", 5, (0.5, 0.51)),
        ("digest", 5, ("cd", "cx")),
    ]
    assert found.first_step == 5
    assert list(found.lines()) == [
        "history: step 5 is the first with another loss: 0.5 and 0.51",
        "history: step 5 is the first with another digest of all weights: cd and cx",
        "history: step 6 is the first with another set of samples: 64-x and 64-6",
    ]


def test_the_smallest_difference_of_a_loss_counts_and_a_skipped_step_is_one() -> None:
    above = 0.5 + 2**-53
    assert above != 0.5
    assert difference(rows({"loss": 0.5}), rows({"loss": above})).first_step == 6

    found = difference(rows(), rows({"loss": None, "skipped": "the gradient"}))
    assert {parting.what for parting in found.partings} == {"loss", "skipped"}


def test_rows_of_older_releases_without_samples_and_digests_are_compared_by_the_rest() -> None:
    one = rows({"digest": "ab"})
    other = {step: {key: value for key, value in row.items() if key != "samples"} for step, row in rows().items()}

    assert difference(one, other).partings == ()


def test_histories_without_a_step_in_common_say_so() -> None:
    found = difference(rows(), {})

    assert list(found.lines()) == ["history: no step that both have"]


def test_fields_are_marked_by_default_and_by_what_they_decide(tmp_path: Path) -> None:
    one = run_of(tmp_path, "one", rows())
    other = run_of(tmp_path, "other", rows(), seed=3, max_workers=4, **{"model.kernel_size": 7})

    found = RunDifference.between(one, other)

    assert sorted(found.field_rows()) == [
        ("max_workers", "2", "4", "placement"),
        ("model.kernel_size", "5 (default)", "7", "trajectory"),
        ("seed", "0 (default)", "3", "trajectory"),
    ]
    assert (found.origin_rows(), found.origin_note()) == ([("git", "one", "other")], "")
    assert RunDifference.between(one, one).origin_note() == "software and data: the same"
    assert found.to_json()["history"]["first_step"] is None


@pytest.mark.parametrize("name", recipe_names())
def test_every_field_of_every_recipe_is_judged(name: str) -> None:
    recipe = named_recipe(name)
    fields = dict(recipe_fields(recipe))

    assert not is_default("name", fields["name"])
    assert is_default("milestone_epochs", [200, 400, 800, 1600])
    assert is_default("model.image_size", [224, 224]) and not is_default("model.image_size", [128, 128])
    decided = {field for field in recipe.trajectory() if field in fields}
    assert not any(is_placement(field) for field in decided)
    assert [is_default(field, value) for field, value in fields.items()].count(True) > len(fields) / 3


def test_datasets_are_compared_by_digest_and_by_size_where_they_are_still_there(tmp_path: Path) -> None:
    manifests = {}
    for name, samples in (("a", 600), ("b", 500)):
        manifest = Manifest(2, name, (), 0, ShardTable.of([ShardEntry("s", samples, 6000, "ab" * 32)]))
        manifest.save(Storage(), str(tmp_path / name), [])
        manifests[name] = manifest
    one, other = (
        run_of(tmp_path, f"of-{name}", rows(), data=str(tmp_path / name), digest=manifests[name].digest)
        for name in "ab"
    )
    gone = run_of(tmp_path, "of-nothing", rows(), data=str(tmp_path / "gone"), digest="elsewhere")

    assert RunDifference.between(one, other).data == {
        "digest": (manifests["a"].digest, manifests["b"].digest),
        "samples": (600, 500),
    }
    assert RunDifference.between(one, gone).data == {
        "digest": (manifests["a"].digest, "elsewhere"),
        "samples": (600, None),
        "shards": (1, None),
    }


def test_a_run_that_never_started_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    one = run_of(tmp_path, "one", rows())
    new = RunDirectory.of(Storage(), one.root, "new")
    new.claim(named_recipe("tiny"))

    found = RunDifference.between(one, new)

    states = {name: values for name, *values in found.state_rows()}
    assert states["state"] == ["finished", "not started"]
    assert states["newest checkpoint"] == ["6", "-"]
    assert found.history.common_steps == 0
    assert RunDifference.between(new, new).origin_note().endswith("not known without a checkpoint of both")
