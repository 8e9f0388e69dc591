"""Checks that all nodes see the same folder: a path is on each node's own disk, unless nodes share a file system.

A run whose ranks write to different disks would find no whole checkpoint, and a data set needs all its shards in one
place. Two processes see the same folder if both see a landmark: a file in it, and the bytes with which it begins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.errors import NotSharedError
from jobs.run.directory import RunDirectory
from pipeline.access.urls import is_local
from pipeline.errors import UserError
from pipeline.shard.manifest import MANIFEST_NAME
from pipeline.store.lease import Lease
from pipeline.store.storage import Storage

if TYPE_CHECKING:  # it imports torch, for which tasks that only copy should not wait
    from jobs.recipe.recipe import Recipe

logger = logging.getLogger(__name__)

VALIDATION_FIELD = "finetune.validation_data"
LANDMARK_BYTES = 4096
ANSWER_SECONDS = 60.0
"""How long a node may take to answer; one that does not is not refused, since its ranks check again."""


@dataclass(frozen=True)
class Landmark:
    """A file by which a process recognises a folder on a local disk."""

    field: str
    """What the folder is called in messages."""
    folder: str
    url: str
    """Of the file."""
    start: bytes
    """Its first bytes."""

    @classmethod
    def of(cls, storage: Storage, field: str, folder: str, url: str) -> Landmark:
        """A file that lies there."""
        return cls(field, folder, url, storage.read_start(url, LANDMARK_BYTES))

    def is_seen(self, storage: Storage) -> bool:
        """Whether it lies where this process looks."""
        try:
            return storage.read_start(self.url, len(self.start)) == self.start
        except (OSError, UserError):
            return False


Landmarks = tuple[Landmark, ...]


def run_landmarks(recipe: Recipe, run: RunDirectory, lease: Lease) -> Landmarks:
    """Landmarks of what every rank needs as long as the run trains, if it lies on a local disk."""
    datasets = rank_datasets(recipe).items()
    manifests = (mark for field, url in datasets for mark in manifest_landmarks(run.storage, url, field))
    return (*lease_landmarks("run_root", run.url, lease), *manifests)


def rank_datasets(recipe: Recipe) -> dict[str, str]:
    """URLs of the data sets that every rank reads, by their fields."""
    part = recipe.finetune
    validation = {VALIDATION_FIELD: part.validation_data} if part and part.validation_data else {}
    return {"data": recipe.data, **validation}


def input_landmarks(storage: Storage, recipe: Recipe, first_tars: Mapping[str, str]) -> Landmarks:
    """Landmarks of what ranks also read, but not always: tars, lists of labels, and weights to start from.

    Args:
        storage: Reaches them.
        recipe: Of the run.
        first_tars: URL of a tar of each of `rank_datasets`, by its field.
    """
    part, datasets = recipe.finetune, rank_datasets(recipe)
    places = [(field, datasets[field], tar) for field, tar in first_tars.items()]
    files = {"init_from": recipe.init_from}
    if part:
        files |= {"finetune.labels": part.labels, "finetune.validation_labels": part.validation_labels}
    places += [(field, url, url) for field, url in files.items()]
    return tuple(mark for field, folder, url in places if url for mark in file_landmarks(storage, field, folder, url))


def manifest_landmarks(storage: Storage, url: str, field: str = "data") -> Landmarks:
    """A landmark of a data set, if it lies on a local disk."""
    return file_landmarks(storage, field, url, Storage.join(url, MANIFEST_NAME))


def file_landmarks(storage: Storage, field: str, folder: str, url: str) -> Landmarks:
    """A landmark of a file, if it lies on a local disk and can be read."""
    if not is_local(url):
        return ()
    with contextlib.suppress(OSError, UserError):  # its reader reports what is wrong with it
        return (Landmark.of(storage, field, folder, url),)
    return ()


def lease_landmarks(field: str, folder: str, lease: Lease) -> Landmarks:
    """A landmark of this process's lease of a folder, if that is on a local disk."""
    return (Landmark(field, folder, lease.url, lease.first_bytes),) if is_local(folder) else ()


@contextlib.contextmanager
def planted(storage: Storage, field: str, folder: str) -> Iterator[Landmarks]:
    """A landmark that is written into a folder on a local disk, while the context is open."""
    if not folder or not is_local(folder):
        yield ()
        return
    url, start = Storage.join(folder, f".seen-{os.urandom(8).hex()}"), os.urandom(16).hex().encode()
    storage.write(url, start)
    try:
        yield (Landmark(field, folder, url, start),)
    finally:
        storage.delete(url)


def check_seen_here(storage: Storage, landmarks: Sequence[Landmark]) -> None:
    """Refuse to work on a node that does not see what the others see.

    Raises:
        NotSharedError: It does not.
    """
    for landmark in landmarks:
        if not landmark.is_seen(storage):
            raise _not_shared(landmark, [socket.gethostname()])


def check_seen_by_all(
    storage: Storage, landmarks: Sequence[Landmark], takes_part: Callable[[Mapping[str, float]], bool]
) -> None:
    """Ask the other nodes of the connected cluster, if there are any.

    Args:
        storage: Reaches the places.
        landmarks: As this process sees them.
        takes_part: Whether a node with these resources will work on them.

    Raises:
        NotSharedError: Some do not see one of them; names the nodes.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes: Any = ray.nodes()  # type: ignore[no-untyped-call]
    others = [node for node in nodes if node["Alive"] and node["NodeID"] != here and takes_part(node["Resources"])]
    if landmarks and others:
        refuse_unseen(landmarks, _asked(storage, landmarks, others))


def refuse_unseen(landmarks: Sequence[Landmark], unseen: Mapping[str, Sequence[int]]) -> None:
    """Raise for the first landmark that a node does not see.

    Args:
        landmarks: What was looked for.
        unseen: Indices of those that were not seen, by the name of the node.

    Raises:
        NotSharedError: A node does not see one of them.
    """
    for number, landmark in enumerate(landmarks):
        if names := sorted(name for name, missing in unseen.items() if number in missing):
            raise _not_shared(landmark, names)


def _asked(
    storage: Storage, landmarks: Sequence[Landmark], nodes: Sequence[Mapping[str, Any]]
) -> dict[str, Sequence[int]]:
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look: Any = ray.remote(num_cpus=0)(_unseen)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    asked = [look.options(scheduling_strategy=place).remote(storage, tuple(landmarks)) for place in places]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_SECONDS)
    answers: dict[str, Sequence[int]] = {}
    for node, answer in zip(nodes, asked, strict=True):
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        try:
            if answer not in ready:
                raise TimeoutError
            answers[name] = ray.get(answer)
        except (RayError, TimeoutError):
            folders = ", ".join(mark.folder for mark in landmarks)
            logger.warning("node %s did not answer whether it sees %s", name, folders)
    return answers


def _unseen(storage: Storage, landmarks: Landmarks) -> list[int]:
    return [number for number, landmark in enumerate(landmarks) if not landmark.is_seen(storage)]


def _not_shared(landmark: Landmark, names: Sequence[str]) -> NotSharedError:
    who = f"{', '.join(names)} {'does' if len(names) == 1 else 'do'} not"
    remedy = "take s3:// or another store, or a folder on a file system that all nodes mount at this path"
    return NotSharedError(landmark.field, f"must be seen by every node ({who})", landmark.folder, remedy)
