"""The manifest: which shards make up a dataset. Written last, so that a dataset either has one or is not finished."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import google_crc32c

from pipeline.access.urls import is_local
from pipeline.errors import DamagedManifestError, DatasetError, StorageError, clipped
from pipeline.image.channels import MOST_CHANNELS, PHOTOGRAPH_BITS, RGB_PIXELS, PixelKind
from pipeline.shard.index import Skipped
from pipeline.shard.pixel_statistics import PixelStatistics
from pipeline.shard.table import CONTENT_COLUMNS, ShardReport, ShardTable, leads_away
from pipeline.store.json_text import parsed_object
from pipeline.store.storage import Storage

FORMAT_VERSION = 3
EXTENDED_VERSION = 4
"""Of manifests by which earlier releases would not read images right: with restart markers, or no photographs."""
UNMEASURED_VERSION = 2
"""Of manifests that do not say what pixels are like: those of earlier releases."""
_VERSIONS = (UNMEASURED_VERSION, FORMAT_VERSION, EXTENDED_VERSION)
MANIFEST_NAME = "manifest.json"
SKIPPED_NAME = "skipped.jsonl"

_CHECKSUM = re.compile(rb',"crc32c":"([0-9a-f]{8})"}\Z')
_CHECKSUM_BYTES = 22


class Made(Protocol):
    """Something that a dataset was made from."""

    @property
    def digest(self) -> str:
        """Identifies it, and what was done to it."""


@dataclass(frozen=True)
class Manifest:
    """A dataset: shards in order, so that sample ids count through them."""

    format_version: int
    sources_digest: str
    """Identifies the images and options that it was made from; the same again is already done."""
    classes: tuple[str, ...]
    """Names of the labels; empty where there are none."""
    skipped: int
    """Images that were skipped; skipped.jsonl beside the manifest names them."""
    shards: ShardTable
    pixels: PixelStatistics | None = None
    """What the pixels are like, of as many channels as images are decoded to. None: unknown, and images are RGB."""
    restart_markers: bool = False
    """Whether JPEGs were given restart markers as they were ingested, and decoded whole when they had them."""

    @functools.cached_property
    def samples(self) -> int:
        """Over all shards."""
        return int(self.shards.samples.sum())

    @functools.cached_property
    def tar_bytes(self) -> int:
        """Over all shards."""
        return int(self.shards.tar_bytes.sum())

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the dataset, down to every image's bytes: checkpoints and caches know it by this.

        SHA-256 of the manifest's fields and of the columns that say what shards hold, each as one line of canonical
        JSON. It omits `etag` and `tar`, so that a copy in another store has the same digest.
        """
        digest = hashlib.sha256(_canonical(self._fields()) + b"\n")
        for name in CONTENT_COLUMNS:  # one by one: 200,000 shards at once would take 100 MB
            digest.update(_canonical({name: self.shards.column(name)}) + b"\n")
        return digest.hexdigest()

    @classmethod
    def of(cls, tasks: Iterable[Made], reports: Iterable[ShardReport], classes: tuple[str, ...]) -> Manifest:
        """Put together what the tasks of one ingest reported, in any order."""
        ordered = sorted(reports, key=lambda report: report.name)
        shards = ShardTable.of(report.entry for report in ordered)
        skipped = sum(len(report.skipped) for report in ordered)
        return cls(UNMEASURED_VERSION, sources_digest(tasks), classes, skipped, shards)

    def measured(self, pixels: PixelStatistics) -> Manifest:
        """The same data set, with what its pixels are like."""
        version = EXTENDED_VERSION if self.restart_markers or not pixels.kind.is_photographic else FORMAT_VERSION
        return replace(self, format_version=version, pixels=pixels)

    @property
    def kind(self) -> PixelKind:
        """What the images are decoded to."""
        return self.pixels.kind if self.pixels else RGB_PIXELS

    def marked(self) -> Manifest:
        """The same data set, which was measured, as one whose images have restart markers."""
        return replace(self, format_version=EXTENDED_VERSION, restart_markers=True)

    @property
    def channels(self) -> int:
        """Of the images as they are decoded."""
        return self.kind.channels

    def to_bytes(self) -> bytes:
        """Canonical JSON; the shards as columns, and last the CRC32C of what the file would be without it."""
        body = _canonical(self._fields() | {"shards": self.shards.to_json()})
        return body[:-1] + b',"crc32c":"%08x"}' % google_crc32c.value(body)

    def save(self, storage: Storage, url: str, skipped: Iterable[Skipped]) -> None:
        """Commit the dataset: the list of skipped images first, the manifest last."""
        lines = [json.dumps(asdict(item)) + "\n" for item in skipped]
        storage.write(Storage.join(url, SKIPPED_NAME), "".join(lines).encode())
        storage.write(Storage.join(url, MANIFEST_NAME), self.to_bytes())

    @classmethod
    def load(cls, storage: Storage, url: str) -> Manifest:
        """Read the manifest of the dataset at `url`.

        Raises:
            DatasetError: Missing, or of an unknown version.
            DamagedManifestError: Unreadable.
        """
        place = Storage.join(url, MANIFEST_NAME)
        try:
            data = storage.read(place)
        except FileNotFoundError:
            rule = f"must hold a {MANIFEST_NAME}"
            raise DatasetError("dataset", rule, url, f"make it with `convmae shard SOURCE {url}`") from None
        try:
            text = _checked(data).decode()
            del data  # tens of megabytes where there are many shards
            fields = parsed_object(text)
            del text
            version = fields["format_version"]
            if type(version) is int and version in _VERSIONS:
                shards = ShardTable.from_json(fields.pop("shards"))
                pixels = None if version == UNMEASURED_VERSION else PixelStatistics.from_json(fields.pop("pixels"))
                _check_version(fields, pixels, version)
                _check_fields(fields)
                _refuse_odd_tars(shards, url)
                return cls(**fields | {"classes": tuple(fields["classes"])}, shards=shards, pixels=pixels)
        except DatasetError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            remedy = f"restore it, or make the dataset again in another place ({type(error).__name__}: {error})"
            raise DamagedManifestError("manifest", "must be readable", place, remedy) from error
        rule = f"must have format_version {UNMEASURED_VERSION}, {FORMAT_VERSION} or {EXTENDED_VERSION}"
        remedy = f"read {place} with the release that wrote it, or shard the dataset again into another place"
        raise DatasetError("manifest", rule, version, remedy)

    def _fields(self) -> dict[str, Any]:
        return {
            "format_version": self.format_version,
            "sources_digest": self.sources_digest,
            "classes": list(self.classes),
            "skipped": self.skipped,
            **({"pixels": self.pixels.to_json()} if self.pixels else {}),
            **({"restart_markers": True} if self.restart_markers else {}),
        }


def _check_version(fields: dict[str, Any], pixels: PixelStatistics | None, version: int) -> None:
    """Raise ValueError for what a manifest of this version does not say, or leaves out."""
    is_marked = fields.get("restart_markers", False)
    if is_marked is not ("restart_markers" in fields):
        raise ValueError("restart_markers must be true, or absent")
    if pixels and pixels.channels > MOST_CHANNELS:
        raise ValueError(f"pixels must have at most {MOST_CHANNELS} channels, have {pixels.channels}")
    is_extended = is_marked or (pixels is not None and not pixels.kind.is_photographic)
    if is_extended != (version == EXTENDED_VERSION):
        rule = "restart_markers, or pixels of other than 1 or 3 channels of 8 bits"
        raise ValueError(f"a manifest must have {rule} in format {EXTENDED_VERSION}, and in no other")


def _check_fields(fields: dict[str, Any]) -> None:
    """Raise ValueError for a field beside the shards that is not of its type."""
    classes, skipped, digest = fields["classes"], fields["skipped"], fields["sources_digest"]
    if not isinstance(classes, list) or not set(map(type, classes)) <= {str}:
        raise ValueError("classes must be a list of strings")
    if type(skipped) is not int or skipped < 0:
        raise ValueError(f"skipped must be an integer of at least 0, is {clipped(str(skipped))!r}")
    if not isinstance(digest, str):
        raise ValueError(f"sources_digest must be a string, is {clipped(str(digest))!r}")


def _refuse_odd_tars(shards: ShardTable, url: str) -> None:
    """Tars must lie in stores; and a dataset in a store must not make this machine read its own files.

    Another store than the manifest's is fine, since indexes may lie elsewhere than their tars.
    """
    places = [place for place in shards.column("tar") if place]
    local = is_local(url)
    for place in places:
        if not place.startswith("/") and "://" not in place and leads_away(place):
            remedy = "index the tars again; what lies elsewhere has its whole URL"
            raise DatasetError("manifest", "must name tars below the dataset", clipped(place), remedy)
    for start in {place.partition("://")[0] + "://" for place in places if "://" in place}:
        try:
            leads_here = is_local(start + "x")
        except StorageError as error:
            raise DatasetError("manifest", f"tars {error.rule}", clipped(start), "index the tars again") from None
        if leads_here and not local:
            raise _leads_here(url, next(place for place in places if place.startswith(start)))
    if not local and (paths := [place for place in places if place.startswith("/")]):
        raise _leads_here(url, paths[0])


def _leads_here(url: str, place: str) -> DatasetError:
    remedy = "index the tars again from where they lie in a store"
    return DatasetError("manifest", f"must not lead from {url} to files of this machine", place, remedy)


def _checked(data: bytes) -> bytes:
    """The manifest without its checksum; those of older releases have none."""
    match = _CHECKSUM.search(data, max(0, len(data) - _CHECKSUM_BYTES))
    if match is None:
        return data
    body = data[: match.start()] + b"}"
    if google_crc32c.value(body) != int(match[1], 16):
        raise ValueError("its CRC32C is wrong")
    return body


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class ChannelMark:
    """That images are decoded to something else than usual: the same bytes are then another data set."""

    pixels: PixelKind

    @property
    def digest(self) -> str:
        """As of `Made`."""
        deep = "" if self.pixels.bits == PHOTOGRAPH_BITS else f" of {self.pixels.bits} bits"
        return f"channels {self.pixels.channels}{deep}"


def channel_marks(pixels: PixelKind) -> tuple[ChannelMark, ...]:
    """What to put beside the tasks of a data set; nothing for RGB of 8 bits, as before there was another."""
    return () if pixels == RGB_PIXELS else (ChannelMark(pixels),)


def sources_digest(tasks: Iterable[Made]) -> str:
    """Identifies all sources of a dataset and how they were shuffled and cut."""
    return hashlib.sha256("\n".join(task.digest for task in tasks).encode()).hexdigest()


def existing_manifest(storage: Storage, url: str, tasks: Iterable[Made]) -> Manifest | None:
    """The manifest that is already at `url` if these tasks made it; None where there is none.

    Raises:
        DatasetError: The dataset there was made from other images or options.
    """
    if not storage.exists(Storage.join(url, MANIFEST_NAME)):
        return None
    manifest = Manifest.load(storage, url)
    if manifest.sources_digest != sources_digest(tasks):
        rule = "must be empty or hold the same dataset"
        remedy = "it was made from other images or options, or by another release; take another place"
        raise DatasetError("destination", rule, url, remedy)
    return manifest
