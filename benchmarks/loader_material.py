"""The same images in the form that each loader reads: a folder, WebDataset shards, and the formats of the others."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import s3fs

from jobs.recipe.image_statistics import IMAGENET_MEAN, IMAGENET_STD
from pipeline.image.photo import ORIGINAL, Encoding
from pipeline.image.restart_markers import PROGRAM
from pipeline.ingest.photographs import cut_tiles
from pipeline.ingest.plan import Sharding, plan_shards
from pipeline.ingest.source import Sources
from pipeline.ingest.sources import find_sources
from pipeline.ingest.writer import write_shard
from pipeline.shard.manifest import Manifest
from pipeline.shard.pixel_statistics import PixelStatistics
from pipeline.store.storage import Storage

SAMPLES_PER_SHARD = 256
CHUNK_BYTES = 16 << 20
"""Of a Streaming shard and of a LitData chunk; close to one of our shards of photographs."""

SIGNED_SECONDS = 6 * 3600


@dataclass(frozen=True)
class Material:
    """Places of the images, in every form."""

    folder: str
    """Of files, in class folders or flat."""
    files: tuple[str, ...]
    """Paths below `folder`; some more than once where there are too few images."""
    root: Path
    """Of all that is made here."""

    @property
    def shards(self) -> str:
        """Our dataset, which webdataset reads too."""
        return str(self.root / "shards")

    @property
    def marked(self) -> str:
        """The same with restart markers; not there where no program writes them."""
        return str(self.root / "marked")

    @property
    def streaming(self) -> str:
        """MosaicML Streaming's."""
        return str(self.root / "streaming")

    @property
    def litdata(self) -> str:
        """LitData's."""
        return str(self.root / "litdata")

    def paths(self) -> list[str]:
        """Paths of the files."""
        return [str(Path(self.folder, file)) for file in self.files]


def make_material(images: str | None, count: int, root: Path) -> Material:
    """Put together at least `count` images, and write them in every form whose library is installed.

    Args:
        images: Folder of JPEGs; None: the photographs of the demonstration, cut into tiles.
        count: Images that are wanted; a smaller folder is repeated as a whole.
        root: Where to write; is there already.
    """
    folder = images or str(root / "photographs")
    if images is None:
        cut_tiles(Path(folder), count, seed=0)
    found = find_sources(Storage(), folder)
    assert isinstance(found, Sources)
    copies = -(-count // len(found.images))
    sources = Sources(found.root, found.classes, tuple(image for _ in range(copies) for image in found.images))
    material = Material(found.root, tuple(image.path.text for image in sources.images), root)
    write_shards(Storage(), sources, material.shards)
    if shutil.which(PROGRAM):
        write_shards(Storage(), sources, material.marked, Encoding(restart_markers=True))
    if installed("streaming"):
        _write_streaming(material)
    if installed("litdata"):
        _write_litdata(material)
    return material


def write_shards(storage: Storage, sources: Sources, url: str, encoding: Encoding = ORIGINAL) -> None:
    """Our dataset, in this process: what `convmae shard` does in Ray tasks, but for the statistics of its pixels."""
    tasks = plan_shards(sources, Sharding(SAMPLES_PER_SHARD, encoding=encoding))
    reports = [write_shard(storage, url, task) for task in tasks]
    manifest = Manifest.of(tasks, reports, sources.classes)
    if encoding.restart_markers:
        manifest = manifest.measured(PixelStatistics(1, IMAGENET_MEAN, IMAGENET_STD)).marked()
    manifest.save(storage, url, [])


def installed(package: str) -> bool:
    """Whether a loader to compare with is here."""
    return importlib.util.find_spec(package) is not None


def copy_to(storage: Storage, folder: str, url: str) -> None:
    """Every file of a folder, to an object store."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            storage.upload(path, Storage.join(url, str(path.relative_to(folder))))


def s3_environment(storage: Storage) -> Mapping[str, str]:
    """Variables by which the other loaders find the object store."""
    assert storage.endpoint_url and storage.key and storage.secret
    return {
        "S3_ENDPOINT_URL": storage.endpoint_url,  # Streaming's name for it
        "AWS_ENDPOINT_URL": storage.endpoint_url,
        "AWS_ACCESS_KEY_ID": storage.key,
        "AWS_SECRET_ACCESS_KEY": storage.secret,
        "AWS_REGION": storage.region or "us-east-1",
    }


def signed_urls(storage: Storage, urls: Iterable[str]) -> tuple[str, ...]:
    """HTTP URLs that need no credentials, which is how webdataset reads S3 without a command of its own."""
    filesystem = s3fs.S3FileSystem(key=storage.key, secret=storage.secret, endpoint_url=storage.endpoint_url)
    return tuple(filesystem.sign(url, expiration=SIGNED_SECONDS) for url in urls)


def _contents(material: Material) -> Iterator[bytes]:
    for path in material.paths():
        yield Path(path).read_bytes()


def _write_streaming(material: Material) -> None:
    import streaming

    writer = streaming.MDSWriter(out=material.streaming, columns={"image": "bytes"}, size_limit=CHUNK_BYTES)
    with writer:
        for data in _contents(material):
            writer.write({"image": data})


def _write_litdata(material: Material) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(material.litdata, chunk_bytes=CHUNK_BYTES)
    for number, data in enumerate(_contents(material)):
        cache[number] = data
    cache.done()
    cache.merge()
