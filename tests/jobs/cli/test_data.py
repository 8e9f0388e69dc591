"""Commands on data sets, on a machine without stack and cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import MANIFEST, Typed, assert_refused

from pipeline.order.sample_order import Order


def test_bad_data_is_refused(typed: Typed, root: str, data: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    roots = f"run_root={root}"

    assert_refused(typed("pretrain", "tiny", roots), "data", "convmae shard")
    assert_refused(typed("pretrain", "tiny", roots, f"data={tmp_path}/empty"), "must hold a manifest.json")
    assert_refused(typed("inspect", "tiny", f"data={tmp_path}/empty"), "must hold a manifest.json")
    assert_refused(typed("inspect", f"{tmp_path}/empty"), "must hold a manifest.json")
    assert_refused(typed("inspect", "tiny", "data=s4://bucket/data"), "'s4://bucket/data'", "did you mean s3://?")
    small = ("global_batch_size=2048", "lanes=8")
    assert_refused(typed("pretrain", "tiny", roots, f"data={data}", *small), "samples", "2048", "1025")
    out = str(tmp_path / "out")
    assert_refused(typed("shard", str(tmp_path / "empty"), out), "source", "missing or empty")
    assert_refused(typed("shard", str(tmp_path / "texts"), out), "source", "a.txt")
    assert_refused(typed("shard", str(tmp_path / "nowhere"), out), "source", "check the path")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_numbers_that_define_no_order_are_refused(typed: Typed, data: str) -> None:
    order = ("order", data, "--batch", "24", "--lanes", "6")

    assert_refused(typed("order", data, "--batch", "24", "--lanes", "7"), "lanes", "must divide", "24")
    assert_refused(typed("order", data, "--batch", "24"), "--lanes")
    assert_refused(typed(*order, "--world", "7"), "world_size", "between 1 and lanes 6")
    assert_refused(typed(*order, "--world", "2", "--rank", "2"), "rank", "0 to 1")
    assert_refused(typed(*order, "--step", "-1"), "step")
    assert_refused(typed(*order, "--steps", "none"), "--steps", "valid integer")
    assert_refused(typed(*order, "--turbo"), "--turbo")
    assert_refused(typed("order", data, "--batch", "2048", "--lanes", "8"), "samples", "1025")
    assert_refused(typed("order", f"{data}/nowhere", "--batch", "24", "--lanes", "6"), "must hold a manifest.json")
    assert_refused(typed(*order), "shard index", "a.index", "missing")
    assert_refused(typed("inspect", data, "epochs=3"), "'epochs=3'", "--batch")
    assert_refused(typed("inspect", data, "--lanes", "7"), "lanes", "7")
    assert_refused(typed("inspect", data, "--batch", "0"), "global_batch_size", "at least 1")
    assert_refused(typed("inspect", "tiny", "--lanes", "8"), "'--lanes'", "lanes=64")


def test_inspect_shows_a_data_set(typed: Typed, data: str) -> None:
    ended = typed("inspect", data)

    assert ended.code == 0
    assert MANIFEST.digest in ended.output
    assert "1,025" in ended.output


def test_order_prints_one_json_object_per_line_for_each_step_and_rank(typed: Typed, indexed_data: str) -> None:
    arguments = ("--batch", "12", "--lanes", "6", "--block", "8", "--window", "2", "--seed", "5", "--step", "7")
    order = Order(100, 12, 6, 5, 8, 2)

    whole = typed("order", indexed_data, *arguments, "--steps", "3", "--json")
    shared = typed("order", indexed_data, *arguments, "--steps", "3", "--world", "4", "--json")
    alone = typed("order", indexed_data, *arguments, "--world", "4", "--rank", "2")

    assert whole.code == shared.code == alone.code == 0
    rows = [json.loads(line) for line in whole.output.splitlines()]
    expected = [[f"{'ab'[sample // 50]}{sample % 50}" for sample in order.batch(step)] for step in (7, 8, 9)]
    assert [row["keys"] for row in rows] == expected
    assert [(row["step"], row["rank"], row["epoch"]) for row in rows] == [
        (step, 0, order.epoch(step)) for step in (7, 8, 9)
    ]
    parts = [json.loads(line) for line in shared.output.splitlines()]
    assert [(row["step"], row["rank"]) for row in parts] == [(step, rank) for step in (7, 8, 9) for rank in range(4)]
    assert [key for row in parts for key in row["keys"]] == [key for keys in expected for key in keys]
    assert alone.output.split()[-len(parts[2]["keys"]) :] == parts[2]["keys"]


def test_inspect_shows_how_a_data_set_would_be_read(typed: Typed, indexed_data: str) -> None:
    options = ("--batch", "12", "--lanes", "6", "--block", "8", "--window", "2", "--world", "3", "--labels")

    text = typed("inspect", indexed_data, *options)
    numbers = json.loads(typed("inspect", indexed_data, *options, "--json").output)

    assert text.code == 0
    assert numbers["samples"] == 100 and numbers["plan"]["world_size"] == 3
    assert numbers["plan"]["steps_per_epoch"] == Order(100, 12, 6, 0, 8, 2).steps_per_epoch
    assert f"{numbers['plan']['design_effect']:.2f} over shards" in text.output
    assert f"{numbers['plan']['label_design_effect']:.2f} over labels" in text.output
    assert f"{numbers['plan']['gets_per_epoch']} (whole blocks)" in text.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("shard", "PHOTOS", "OUT", "--shard-bytes", "many"), "--shard-bytes: must be a number of bytes"),
        (("shard", "PHOTOS", "OUT", "--shard-bytes", "1MB", "--samples-per-shard", "5"), "give one of the two"),
        (("shard", "PHOTOS", "OUT", "--quality", "0"), "quality: must be from 1 to 100"),
        (("shard", "PHOTOS/{0..3}.tar", "OUT"), "PHOTOS/0.tar"),
        (("index", "PHOTOS"), "must be a tar, a folder of tars or a pattern of them"),
        (("verify", "PHOTOS"), "must hold a manifest.json"),
        (("shard", "PHOTOS", "PHOTOS"), "destination: must not lie in the source's folder"),
        (("shard", "PHOTOS/", "PHOTOS/b/../out"), "destination: must not lie in the source's folder"),
        (("shard", "PHOTOS", "memory://out"), "URL: must be one that every process sees"),
        (("shard", "PHOTOS", "http://127.0.0.1:1/out"), "URL: must be one that can be written"),
        (("shard", "PHOTOS", ""), "URL: must not be empty"),
        (("shard", "", "OUT"), "URL: must not be empty"),
    ],
)
def test_bad_arguments_of_data_set_commands_are_refused_before_anything_starts(
    typed: Typed, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"1")
    places = {"PHOTOS": str(tmp_path / "photos"), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        arguments = tuple(argument.replace(name, place) for argument in arguments)
        told = told.replace(name, place)

    ended = typed(*arguments)

    assert ended.code == 2
    assert told in ended.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_finds_a_damaged_manifest(typed: Typed, tmp_path: Path, as_json: bool) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version":')

    ended = typed("verify", str(tmp_path), *(["--json"] if as_json else []))

    assert ended.code == 1
    assert "has a damaged manifest" in ended.error
    if as_json:
        (fault,) = json.loads(ended.output)["faults"]
        assert (fault["shard"], fault["key"], fault["offset"]) == ("manifest.json", None, None)
    else:
        assert "manifest.json: must be readable" in ended.output
