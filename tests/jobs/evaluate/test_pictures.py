"""Reconstructions of one's own pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_data import STORAGE, picture
from PIL import Image

from jobs.errors import EvaluationError
from jobs.evaluate.pictures import COLUMNS, MOST_PICTURES, found_pictures, png, reconstructed
from jobs.evaluate.subject import Subject
from jobs.report.reconstruction import draw_grid, reconstruct_panels
from jobs.weights.file_statistics import IMAGENET
from model import ConvMAE, ConvMAEConfig
from model.noise import mask_noise
from pipeline.image.augment import center_crop


@pytest.fixture(scope="module")
def model(small: ConvMAEConfig) -> ConvMAE:
    return Subject.of_seed(small, 0, "small").model()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        picture(number, 0).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_files_and_folders_of_images_are_found_in_order(folder: Path) -> None:
    every = [str(folder / f"{number}.png") for number in range(3)]

    assert found_pictures(STORAGE, [str(folder)], "/") == every
    assert found_pictures(STORAGE, ["2.png", f"{folder}/"], str(folder)) == [every[2], *every]


def test_a_few_pictures_are_drawn_as_a_run_draws_its_own(folder: Path, model: ConvMAE) -> None:
    urls = found_pictures(STORAGE, [str(folder)], "/")

    found = reconstructed(STORAGE, urls, model, IMAGENET, seed=5)

    crops = [center_crop(np.array(Image.open(url).convert("RGB")), (32, 32)) for url in urls]
    noise = mask_noise(5, 0, torch.arange(3), model.config.mask_patches, "cpu")
    panels = reconstruct_panels(model, IMAGENET, torch.from_numpy(np.stack(crops)), noise)
    names = ("original", "what the model sees: 75% is hidden", "reconstruction")
    expected = draw_grid(list(zip(names, panels, strict=True)))
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert reconstructed(STORAGE, urls, model, IMAGENET, seed=6).tobytes() != found.tobytes()


def test_more_than_a_row_are_stacked_with_columns_of_one_width(folder: Path, model: ConvMAE) -> None:
    urls = [str(folder / "0.png")] * (COLUMNS + 2)

    whole = np.asarray(reconstructed(STORAGE, urls, model, IMAGENET, seed=0))

    first = np.asarray(reconstructed(STORAGE, urls[:COLUMNS], model, IMAGENET, seed=0))
    assert whole.shape == (2 * first.shape[0], *first.shape[1:])
    assert np.array_equal(whole[: first.shape[0]], first)
    column = (first.shape[1] - 8) // COLUMNS
    assert (whole[first.shape[0] + 40 :, 8 + 2 * column :] == 255).all()
    original = slice(26, 26 + column - 8)
    assert np.array_equal(whole[original, 8 : 8 + column], whole[first.shape[0] :][original, 8 : 8 + column])


def test_the_file_is_a_png_of_the_same_bytes_each_time(folder: Path, model: ConvMAE) -> None:
    drawn = reconstructed(STORAGE, [str(folder / "0.png")], model, IMAGENET, seed=0)

    assert png(drawn) == png(drawn)
    assert Image.open(io.BytesIO(png(drawn))).format == "PNG"


def test_what_is_no_picture_is_refused(folder: Path, model: ConvMAE) -> None:
    (folder / "empty").mkdir()
    for place in ("gone.png", "empty"):
        with pytest.raises(EvaluationError, match="PICTURES: must be image files, or folders that hold some"):
            found_pictures(STORAGE, [place], str(folder))
    with pytest.raises(EvaluationError, match=f"must be at most {MOST_PICTURES}"):
        found_pictures(STORAGE, ["0.png"] * (MOST_PICTURES + 1), str(folder))
    with pytest.raises(EvaluationError, match=r"must be images that decode.*notes\.txt"):
        reconstructed(STORAGE, [str(folder / "notes.txt")], model, IMAGENET, seed=0)
