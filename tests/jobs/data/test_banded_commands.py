"""Images of 16 bits and of many bands, by the commands as typed: stored, looked at, trained on, reconstructed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from testbed import Command, small_recipe

from jobs.weights.consolidated import of_file


@pytest.mark.slow
@pytest.mark.parametrize(("bands", "bits"), [(1, 16), (5, 16), (4, 8)])
def test_a_folder_becomes_a_data_set_a_run_and_weights(convmae: Command, tmp_path: Path, bands: int, bits: int) -> None:
    folder, data, random = tmp_path / "images", str(tmp_path / "data"), np.random.default_rng(0)
    folder.mkdir()
    for number in range(48):
        values = random.integers(0, 1 << (bits - 2), (40, 44, bands), np.uint16 if bits == 16 else np.uint8)
        layout = {"planarconfig": "contig"} if bands > 1 else {}
        tifffile.imwrite(folder / f"{number:02d}.tif", values.squeeze(), photometric="minisblack", **layout)
    Image.new("RGB", (40, 40)).save(folder / "photograph.jpg")
    kind = ["--bands", str(bands), "--bits", str(bits)]

    out, _ = convmae("shard", str(folder), data, *kind, "--samples-per-shard", "20")
    assert "48 images in 3 shards" in out and "1 sources skipped" in out
    (skipped,) = convmae.run("x").storage.read(f"{data}/skipped.jsonl").decode().splitlines()
    assert "photograph.jpg" in skipped
    assert "3 kept" in convmae("shard", str(folder), data, *kind, "--samples-per-shard", "20")[0]
    convmae("verify", data, "--deep")
    assert f"{bands} channels of {bits} bits, measured on 48 images" in convmae("inspect", data)[0]
    pixels = json.loads(convmae.run("x").storage.read(f"{data}/manifest.json"))["pixels"]
    np.testing.assert_allclose(pixels["mean"], [1 / 8] * bands, rtol=0.02)  # of a range whose upper end is a quarter

    recipe = small_recipe(data, run_root=str(tmp_path / "runs"), max_steps=2)
    out, _ = convmae("submit", *recipe, "--run", "banded", "--follow")
    assert "banded: finished at step 2 of 2" in out
    weights = str(tmp_path / "weights.safetensors")
    convmae("consolidate", str(tmp_path / "runs" / "banded"), "--out", weights)
    found = of_file(convmae.run("x").storage, weights)
    assert found.config.in_channels == bands and found.image_bits == bits
    np.testing.assert_allclose(found.statistics.mean, pixels["mean"])
    picture = tmp_path / "picture.png"
    convmae("reconstruct", str(folder / "00.tif"), "--weights", weights, "--out", str(picture))
    with Image.open(picture) as image:
        assert len(image.convert("L").getcolors() or ()) > 100  # shades, thus no empty page
