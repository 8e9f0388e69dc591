"""Measurements of a loader, each in a fresh process: speed, time to the first batch, memory over epochs, pixels.

    echo '{"measure": "speed", "side": "ours", "place": {...}}' | python loader_measures.py

prints one line of JSON.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import loader_sides
import numpy as np
import psutil
from loader_sides import BATCH, SEED, SIDE, Place
from PIL import Image

from pipeline.image.augment import augmented, center_crop, crop_draws, random_crop
from pipeline.image.decode import decode
from pipeline.store.storage import Storage

COMPARED_IMAGES = 400
"""For pixels, at most."""


def speed(place: Place, side: str) -> dict[str, float]:
    """Images a second from the first batch on: then workers are up and buffers are filled."""
    batches = loader_sides.SIDES[side](place)
    next(batches)
    began, cpu_before = time.perf_counter(), _cpu_seconds()
    images, cpu_seconds = 0, cpu_before
    for size in batches:
        images += size
        cpu_seconds = max(cpu_seconds, _cpu_seconds())  # workers that have ended are no longer seen
    wall_seconds = time.perf_counter() - began
    return {"images": images, "wall_seconds": wall_seconds, "cpu_seconds": cpu_seconds - cpu_before}


def first_batch(place: Place, at: float) -> dict[str, float]:
    """From nothing, imports aside, to the first batch at a fraction of an epoch."""
    _warm_up(place)
    began = time.perf_counter()
    loader, order = loader_sides.open_ours(place)
    step = int(order.steps_per_epoch * at)
    batches = loader.batches(step, order.steps_per_epoch)
    next(batches)
    seconds = time.perf_counter() - began
    batches.close()
    return {"seconds": seconds, "step": step}


def webdataset_skip(place: Place, batches: int, *, decoded: bool) -> dict[str, float]:
    """From nothing, imports aside, to webdataset's batch behind `batches` others.

    Args:
        place: Where the tars are.
        batches: To skip.
        decoded: By iterating over the loader, as one does; else by skipping samples before they are decoded.
    """
    import webdataset  # noqa: F401

    _warm_up(place)
    began = time.perf_counter()
    if decoded:
        stream = loader_sides.webdataset(place)
        next(itertools.islice(stream, batches, None))
    else:
        next(loader_sides.webdataset(place, skip=batches * BATCH // place.threads))
    return {"seconds": time.perf_counter() - began}


def memory(place: Place, epochs: int) -> dict[str, list[float]]:
    """Resident MB at the end of each epoch of one stream."""
    loader, order = loader_sides.open_ours(place)
    process, megabytes = psutil.Process(), []
    for batch in loader.batches(0, epochs * order.steps_per_epoch):
        if (batch.step + 1) % order.steps_per_epoch == 0:
            megabytes.append(process.memory_info().rss / 1e6)
    return {"megabytes": megabytes}


def pixels(place: Place) -> dict[str, float]:
    """Mean absolute difference from PIL's decoder and bicubic of the same crop, in 1/255."""
    differences = []
    for number, path in enumerate(place.paths[:COMPARED_IMAGES]):
        data = Path(path).read_bytes()
        decoded = decode(data)
        crop = random_crop(crop_draws(SEED, 0, np.array([number]))[0], *decoded.shape[:2])
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
        expected = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int)
        ours = augmented(decoded, crop, (SIDE, SIDE)).transpose(1, 2, 0)
        differences.append(np.abs(ours - (expected[:, ::-1] if crop.flip else expected)).mean())
    return {"mean": float(np.mean(differences)), "worst_image": float(np.max(differences))}


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "speed": speed,
    "first_batch": first_batch,
    "webdataset_skip": webdataset_skip,
    "memory": memory,
    "pixels": pixels,
}


def request(measure: str, place: Place, **arguments: Any) -> str:
    """The JSON that this file reads from standard input for a measurement."""
    return json.dumps({"measure": measure, "place": asdict(place), **arguments})


def _warm_up(place: Place) -> None:
    """Load what the first decode and resize load."""
    loader_sides.mae_recipe(Image.open(place.paths[0]).convert("RGB"))
    center_crop(decode(Path(place.paths[0]).read_bytes()), (SIDE, SIDE))


def _cpu_seconds() -> float:
    """CPU seconds of this process and of those that it started and that still run."""
    process = psutil.Process()
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            times = one.cpu_times()
            total += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total


def main() -> None:
    """Measure what standard input asks for."""
    arguments = json.load(sys.stdin)
    fields = arguments.pop("place")
    storage = Storage.from_json(fields.pop("storage"))
    place = Place(storage=storage, **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    print(json.dumps(MEASURES[arguments.pop("measure")](place, **arguments)), flush=True)


if __name__ == "__main__":
    main()
