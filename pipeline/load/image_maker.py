"""One image of a batch: decode, crop, flip; and its substitute where its sample cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DatasetError
from pipeline.image.augment import Augmentation, Crop, CropRow, Draws
from pipeline.image.channels import PixelKind
from pipeline.image.decode import Pixels, decode
from pipeline.image.decode_crop import decode_crop
from pipeline.load.bad_sample import MAX_CONSECUTIVE_BAD_SAMPLES, BadSample, OnBadSample
from pipeline.load.dataset import Dataset
from pipeline.load.shard_reader import Sample
from pipeline.order.sample_order import Order
from pipeline.order.substitutes import block_mates, from_elsewhere


@dataclass(frozen=True)
class BadSamplePolicy:
    """The response to a sample that is not as it was ingested, or does not decode."""

    on_bad_sample: OnBadSample = "fail"
    max_consecutive: int = MAX_CONSECUTIVE_BAD_SAMPLES
    """Samples in a row of one lane that may be replaced; also, blocks that may be tried for one substitute."""

    def too_many(self, bad: BadSample) -> DatasetError:
        """The error that stops a run which would skip too much."""
        remedy = f"check the dataset with `convmae verify`; the last one: {bad.reason}, in {bad.url}"
        rule = f"at most {self.max_consecutive} samples in a row may be unusable"
        return DatasetError("max_consecutive_bad_samples", rule, f"{self.max_consecutive}+", remedy)


@dataclass(frozen=True)
class Substitution:
    """A sample that was replaced in one epoch."""

    bad: BadSample
    epoch: int
    substitute: int
    """Id of the sample whose image was used."""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values, those of the sample first."""
        return {**self.bad.to_json(), "epoch": self.epoch, "substitute": self.substitute}


class ImageMaker:
    """A maker of pixels from samples.

    Owns: which samples were found bad, so that a substitute is not looked for among them twice.
    Concurrency: safe to call from several threads. What is made of a sample depends on nothing but its arguments, and
        on which samples are bad.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        *,
        kind: PixelKind,
        seed: int,
        policy: BadSamplePolicy,
        augmentation: Augmentation,
        refused: Mapping[int, str],
    ) -> None:
        """Do no I/O.

        Args:
            dataset: Where substitutes are read.
            order: Decides them.
            kind: To what images are decoded.
            seed: Decides them, too.
            policy: What to do with samples that cannot be used.
            augmentation: What is made of a decoded image.
            refused: Ids of samples that are not to be decoded, since that ended a process, and why.
        """
        self._dataset = dataset
        self._order = order
        self._kind = kind
        self._seed = seed
        self._policy = policy
        self._augmentation = augmentation
        self._is_marked = dataset.manifest.restart_markers
        self._refused = refused
        self._known_bad: set[int] = set()

    def fill(
        self, epoch: int, found: Sample | BadSample, draws: Draws, out: Pixels, crop: CropRow
    ) -> Substitution | None:
        """Write the image of a sample, or that of its substitute.

        A substitute is cropped and flipped as the sample that it stands in for would have been, so that it differs
        from its own appearance in the epoch.

        Args:
            epoch: Decides the substitute.
            found: What was read.
            draws: Of its crop and flip in the epoch.
            out: (C, H, W), written; its shape is that of the image.
            crop: (5,), written: what was shown of the image that was used.

        Returns:
            How it was replaced; None where it was not.

        Raises:
            DatasetError: The sample is unusable and the policy is to fail, or no substitute was found.
        """
        bad = self._made(found, draws, out, crop)
        if bad is None:
            return None
        if self._policy.on_bad_sample == "fail":
            raise bad.error()
        return Substitution(bad, epoch, self._substituted(epoch, bad, draws, out, crop))

    def _substituted(self, epoch: int, bad: BadSample, draws: Draws, out: Pixels, crop: CropRow) -> int:
        for candidate in block_mates(self._order, self._seed, epoch, bad.id):
            if self._stands_in(candidate, draws, out, crop):
                return candidate
        for tried, candidate in enumerate(from_elsewhere(self._order, self._seed, epoch, bad.id)):
            if tried >= self._policy.max_consecutive:
                break
            if self._stands_in(candidate, draws, out, crop):
                return candidate
        raise self._policy.too_many(bad)

    def _stands_in(self, candidate: int, draws: Draws, out: Pixels, crop: CropRow) -> bool:
        if candidate in self._known_bad:
            return False
        (found,) = self._dataset.read_each([candidate])
        return self._made(found, draws, out, crop) is None

    def _made(self, found: Sample | BadSample, draws: Draws, out: Pixels, crop: CropRow) -> BadSample | None:
        """Write the image; returns what is wrong if it cannot be."""
        bad = found if isinstance(found, BadSample) else self._drawn(found, draws, out, crop)
        if bad:
            self._known_bad.add(bad.id)
        return bad

    def _drawn(self, sample: Sample, draws: Draws, out: Pixels, crop: CropRow) -> BadSample | None:
        if sample.id in self._refused:
            return _undecodable(sample, self._refused[sample.id])
        image_shape = (out.shape[1], out.shape[2])
        what = f"{sample.member} at offset {sample.offset} of {sample.url}"
        with self._dataset.activities.doing("decode", what, sample.id):
            try:
                shown, chosen = self._decoded(sample.data, draws, image_shape)
            except ValueError as error:
                return _undecodable(sample, str(error))
            out[:] = self._augmentation.image(shown, chosen, draws, image_shape)
            crop[:] = (chosen.top, chosen.left, chosen.height, chosen.width, chosen.flip)
        return None

    def _decoded(self, data: bytes, draws: Draws, image_shape: tuple[int, int]) -> tuple[Pixels, Crop]:
        """The pixels of the crop, and the crop; raises ValueError as `decode`."""

        def choose(height: int, width: int) -> Crop:
            return self._augmentation.crop(draws, height, width)

        least_shape = image_shape if self._augmentation.scaled_decode else None
        found = decode_crop(data, self._kind.channels, choose, is_marked=self._is_marked, least_shape=least_shape)
        if found is not None:
            return found
        pixels = decode(data, self._kind.channels, self._kind.bits)
        crop = choose(*pixels.shape[:2])
        return crop.of(pixels), crop


def _undecodable(sample: Sample, why: str) -> BadSample:
    name = f"{sample.shard}/{sample.member}"
    return sample.bad("undecodable", f"{name} at offset {sample.offset} does not decode ({why})")
