"""Image sizes as they are written on a command line."""

from __future__ import annotations

import pytest

from jobs.weights.image_size import image_shape
from model import ConvMAEConfig
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("text", "shape"),
    [("", (64, 96)), ("512", (512, 512)), ("32x48", (32, 48)), ("16", (16, 16)), ("16384", (16384, 16384))],
)
def test_sizes_are_read_by_side_or_by_height_and_width(text: str, shape: tuple[int, int]) -> None:
    assert image_shape(text, ConvMAEConfig(image_size=(64, 96))) == shape


@pytest.mark.parametrize(
    "text", ["0", "8", "100", "224x", "x224", "224x230", "-16", "16.0", "1e3", "16400", "9" * 40, "224 224", "٣٢", "a"]
)
def test_sizes_to_which_positions_cannot_be_interpolated_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--image-size: must be a side or HEIGHTxWIDTH, multiples of 16 up to 16384"):
        image_shape(text, ConvMAEConfig())


def test_views_of_the_pretraining_bound_no_image_size_of_an_encoder() -> None:
    config = ConvMAEConfig(views=4)

    assert image_shape("240", config) == (240, 240), "225 patches, which four views do not share"
