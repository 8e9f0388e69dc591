"""The schedules of the papers, the order of samples, and the learning rates of layers."""

from __future__ import annotations

from pathlib import Path

import pytest
from schedule import (
    DetectionSchedule,
    Schedule,
    ScheduleError,
    SegmentationSchedule,
    learning_rate_factor,
    read_schedule,
)
from torch import nn
from training import made_optimizer, places_of_step

from model import Backbone, ConvMAEConfig

FOLDER = Path(__file__).parents[2] / "examples" / "schedules"
SMALL = ConvMAEConfig(image_size=64, embed_dim=(8, 16, 24), num_heads=2, depth=(1, 1, 3))


def read(name: str, *overrides: str) -> Schedule:
    kind = SegmentationSchedule if name.startswith("ade") else DetectionSchedule
    return read_schedule(kind, FOLDER / f"{name}.toml", overrides)


def test_all_schedules_can_be_read() -> None:
    assert {read(path.stem).steps for path in FOLDER.glob("*.toml")} >= {92187, 184375, 160000}


def test_the_paper_of_coco_has_25_epochs_and_a_cosine() -> None:
    schedule = read("coco_paper")

    assert schedule.steps * schedule.batch_size / 118_000 == pytest.approx(25, abs=0.001)
    assert learning_rate_factor(schedule, 0) == 0.001
    assert learning_rate_factor(schedule, 92187 // 3) == pytest.approx(0.75, abs=1e-4)
    assert learning_rate_factor(schedule, 92186) < 1e-8


def test_vitdet_on_coco_takes_tenths() -> None:
    schedule = read("coco_vitdet")

    assert schedule.steps * schedule.batch_size / 118_000 == pytest.approx(25, abs=0.001)
    assert learning_rate_factor(schedule, 125) == pytest.approx((1 + 0.001) / 2)
    assert [learning_rate_factor(schedule, step) for step in (250, 163_888)] == [1, 1]
    assert learning_rate_factor(schedule, 163_889) == pytest.approx(0.1)
    assert learning_rate_factor(schedule, 177_546) == pytest.approx(0.01)


def test_ade20k_goes_down_a_line() -> None:
    schedule = read("ade20k_paper")

    assert learning_rate_factor(schedule, 0) == pytest.approx(1e-6)
    assert learning_rate_factor(schedule, 40_000) == 0.75
    assert learning_rate_factor(schedule, 159_999) == pytest.approx(1 / 160_000)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=1", "stepz: is not a field of this schedule, got 'stepz'; did you mean steps?"),
        ("steps=0", "steps: should be greater than 0, got 0; "),
        ("milestones=[3]", "milestones: are given with decay = 'steps', and only then"),
        ("steps", "--set: must be field=value as in TOML"),
    ],
)
def test_an_impossible_schedule_is_refused_by_its_field(override: str, message: str) -> None:
    with pytest.raises(ScheduleError) as raised:
        read("coco_paper", override)

    assert str(raised.value).startswith(message)
    assert len(str(raised.value).splitlines()) == 1


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="--schedule: must be a TOML file"):
        read_schedule(DetectionSchedule, tmp_path / "none.toml")


def test_each_epoch_is_a_permutation_of_its_own_and_no_sample_is_left_out_between() -> None:
    places = [place for step in range(7) for place in places_of_step(5, 10, 4, step)]

    epochs = [[sample for epoch, sample in places if epoch == number] for number in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert len(epochs[2]) == 8
    assert places_of_step(6, 10, 4, 0) != places[:4]


def test_layers_and_kinds_of_parameters_have_their_rates() -> None:
    schedule = DetectionSchedule(
        steps=1, batch_size=1, learning_rate=1, weight_decay=0.1, layer_decay=0.5, classes=1, image_size=32
    )
    model = nn.ModuleDict({"backbone": Backbone(SMALL), "head": nn.Linear(2, 2)})

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        names[id(parameter)]: (group["scale"], group["weight_decay"])
        for group in made_optimizer(model, schedule).param_groups
        for parameter in group["params"]
    }

    assert groups["head.weight"] == (1, 0.1)
    assert groups["head.bias"] == (1, 0)
    assert groups["backbone.encoder.blocks3.2.attn.qkv.weight"] == (0.5, 0.1)
    assert groups["backbone.encoder.blocks3.0.norm1.weight"] == (0.125, 0)
    assert groups["backbone.encoder.blocks2.0.conv1.weight"] == (0.0625, 0.1)
    assert groups.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
