"""The pixels of a crop by decoding less than the whole image, where its bytes allow it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipeline.image.augment import Crop
from pipeline.image.decode import Pixels, decode_jpeg
from pipeline.image.jpeg_parts import Frame, JpegPart, MarkedJpeg
from pipeline.image.other_formats import refuse_bomb

SHRINKS = (8, 4, 2)
"""Fractions of its size at which libjpeg-turbo decodes a JPEG with kernels made for them."""

Choose = Callable[[int, int], Crop]
"""Given height and width of an image."""


def decode_crop(
    data: bytes, channels: int, choose: Choose, *, is_marked: bool, least_shape: tuple[int, int] | None
) -> tuple[Pixels, Crop] | None:
    """(height, width, channels) pixels of a crop, and what they show; None where the whole image has to be decoded.

    Args:
        data: Of the file.
        channels: To which to decode.
        choose: Says what to show.
        is_marked: Whether restart markers may be relied on: the image was decoded whole when they were written. What
            a part does not need is not looked at, so damage there would be missed.
        least_shape: Height and width to which the crop will be resized. Where it has twice as many pixels, or more, the
            JPEG is decoded at a fraction of its size: the crop's edges move to the nearest pixels of that, by up to
            four, and what it shows is slightly blurred. None: never.

    Raises:
        ValueError: The image has more pixels than PIL's guard allows.
    """
    if not is_marked and least_shape is None:
        return None
    jpeg = MarkedJpeg.of(data) if is_marked else None
    frame = jpeg.frame if jpeg else Frame.of(data)
    if frame is None:
        return None
    refuse_bomb(frame.height, frame.width)
    crop = choose(frame.height, frame.width)
    shrink = _shrink(crop, least_shape) if least_shape else 1
    part = jpeg.part(crop.top, crop.left, crop.height, crop.width, shrink) if jpeg else None
    if part is None and shrink == 1:
        return None
    part = part or JpegPart(data, 0, 0)
    try:
        pixels = decode_jpeg(part.data, channels, shrink)
    except ValueError:  # the whole image may be fine without its metadata, or says itself what is wrong with it
        return None
    crop = _aligned(crop, shrink, frame)
    top, left = (crop.top - part.top) // shrink, (crop.left - part.left) // shrink
    height, width = -(-crop.height // shrink), -(-crop.width // shrink)
    return pixels[top : top + height, left : left + width], crop


def _shrink(crop: Crop, least_shape: tuple[int, int]) -> int:
    """The most by which a crop can be shrunk and still have a pixel for each that is wanted."""
    fits = (by for by in SHRINKS if crop.height >= by * least_shape[0] and crop.width >= by * least_shape[1])
    return next(fits, 1)


def _aligned(crop: Crop, shrink: int, frame: Frame) -> Crop:
    """The crop with each edge at the nearest one between pixels of the image that was shrunk."""
    top, left, bottom, right = (
        (edge + shrink // 2) // shrink * shrink
        for edge in (crop.top, crop.left, crop.top + crop.height, crop.left + crop.width)
    )
    return replace(
        crop, top=top, left=left, height=min(bottom, frame.height) - top, width=min(right, frame.width) - left
    )
