from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import bench_loader
import loader_measures
import loader_sides
import numpy as np
import pytest
import torch
from loader_goals import Goal, Medians, goals, growth
from loader_material import Material, make_material, signed_urls
from loader_sides import Place
from local_s3 import local_s3
from PIL import Image

from pipeline.image.restart_markers import PROGRAM
from pipeline.store.storage import Storage

COUNT = 256
needs_jpegtran = pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="no jpegtran here")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(None, COUNT, tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def place(material: Material) -> Place:
    tars = tuple(str(path) for path in sorted(Path(material.shards).glob("*.tar")))
    return Place(
        paths=tuple(material.paths()),
        shards=material.shards,
        marked=material.marked,
        tars=tars,
        streaming=material.streaming,
        litdata=material.litdata,
        storage=Storage(),
        threads=2,
        scratch="",
    )


@pytest.fixture(autouse=True)
def no_worker_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sides' DataLoaders work in this process, which has threads that a fork would lose."""
    original = torch.utils.data.DataLoader.__init__

    def init(self: object, *args: object, **options: object) -> None:
        original(self, *args, **options | {"num_workers": 0})  # type: ignore[arg-type]

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", init)


@pytest.mark.parametrize("side", ["bare", "webdataset", "torch"])
def test_a_side_makes_every_image_once(place: Place, side: str) -> None:
    assert sum(loader_sides.SIDES[side](place)) == COUNT


@needs_jpegtran
def test_sides_with_restart_markers_make_as_many(place: Place) -> None:
    assert sum(loader_sides.SIDES["bare marked"](place)) == COUNT
    assert sum(loader_sides.SIDES["ours marked"](place)) == sum(loader_sides.ours(place))


def test_ours_makes_two_epochs(place: Place) -> None:
    _, order = loader_sides.open_ours(place)

    assert sum(loader_sides.ours(place)) == 2 * order.steps_per_epoch * loader_sides.BATCH


@pytest.mark.slow
def test_a_side_on_s3_makes_every_image_once(place: Place, material: Material, tmp_path: Path) -> None:
    with local_s3(tmp_path) as server:
        for path in Path(material.shards).iterdir():
            server.storage.upload(path, f"{server.url}/shards/{path.name}")
        urls = [f"{server.url}/shards/{Path(tar).name}" for tar in place.tars]
        there = replace(
            place, shards=f"{server.url}/shards", storage=server.storage, tars=signed_urls(server.storage, urls)
        )

        assert sum(loader_sides.webdataset(there)) == COUNT
        assert sum(loader_sides.ours(there)) == sum(loader_sides.ours(place))


def test_the_recipe_of_the_others_is_a_crop_in_pil_of_the_wanted_size() -> None:
    image = Image.fromarray(np.full((300, 400, 3), 77, np.uint8))

    made = loader_sides.mae_recipe(image)

    assert made.shape == (3, 224, 224) and made.dtype == torch.uint8 and bool((made == 77).all())


def test_a_small_folder_is_repeated(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    for folder in (source, root):
        folder.mkdir()
    for number in range(3):
        Image.fromarray(np.full((40, 40, 3), number, np.uint8)).save(source / f"{number}.jpg")

    made = make_material(str(source), 7, root)

    assert len(made.files) == 9 and len(set(made.files)) == 3


@pytest.mark.slow
def test_what_is_measured_in_a_process_comes_back(place: Place) -> None:
    def measure(name: str, **arguments: object) -> dict[str, float]:
        asked = loader_measures.request(name, place, **arguments)
        command = [sys.executable, loader_measures.__file__]
        done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    speed = measure("speed", side="ours")
    assert speed["images"] > 0 and speed["wall_seconds"] > 0 and speed["cpu_seconds"] > 0
    assert measure("first_batch", at=0.5)["step"] == 2


def test_pixels_are_as_near_to_pil_as_the_goal_says(place: Place) -> None:
    assert loader_measures.pixels(place)["mean"] < 0.1


def test_memory_has_a_figure_an_epoch(place: Place) -> None:
    assert len(loader_measures.memory(place, 3)["megabytes"]) == 3


def test_growth_is_the_slope_after_the_first_epochs() -> None:
    assert growth([100, 300, 500, 600, 600, 602, 604, 606]) == pytest.approx(2)


def test_goals_compare_with_the_fastest_of_the_others() -> None:
    speed = {(side, where, 2): 100.0 for side in ("webdataset", "torch") for where in ("disk", "s3")}
    speed |= {("torch", "disk", 2): 125.0, ("ours", "disk", 2): 350.0, ("ours", "s3", 2): 315.0}
    speed |= {("bare", "memory", 2): 400.0, ("ours", "disk", 1): 200.0, ("ours marked", "disk", 2): 500.0}
    seconds = {"ours, first batch at step 0": 0.2, "ours, first batch at the middle": 0.4}
    seconds["webdataset, batches up to the middle"] = 3.0

    found = {goal.name: goal for goal in goals(Medians(speed, speed, seconds, 2), [100.0] * 20, 0.03)}

    assert found["speed over webdataset, local disk"] == Goal("speed over webdataset, local disk", 3.0, 3.5, 3.5)
    assert found["speed over the best peer, local disk"].found == pytest.approx(2.8)
    assert found["local S3's share of local disk's speed"].found == pytest.approx(0.9)
    assert found["with restart markers, over the bare loop"].found == 1.25
    missed = {name for name, goal in found.items() if not goal.reached}
    assert missed == {
        "share of the bare loop's speed",
        "thread scaling, 1 to 2",
        "first batch, middle of an epoch over step 0",
        "first batch at the middle, webdataset over ours",
    }


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["bench_loader.py", "--count", str(COUNT), "--rounds", "1"])
    monkeypatch.setattr(bench_loader, "MEMORY_EPOCHS", 6)
    yield


@pytest.mark.slow
def test_the_benchmark_prints_every_goal(arguments: None, capsys: pytest.CaptureFixture[str]) -> None:
    bench_loader.main()

    out = capsys.readouterr().out
    assert out.count("reached") == (12 if shutil.which(PROGRAM) else 11)
    assert "webdataset  s3" in out and "MB at the end of each of 6 epochs" in out
