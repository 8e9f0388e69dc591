"""A memory checkpoint that is whole, and reads of its parts from the holders that have them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.checkpoint.checkpoint import folder_name, owner_name
from jobs.checkpoint.commit import Commit
from jobs.checkpoint.held.holder import Part, holder_name

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
"""For a holder to answer; one on a host that fell silent would be waited for until Ray's head gives its node up."""


@dataclass(frozen=True)
class HeldCheckpoint:
    """What a commit object is to a checkpoint in the store; picklable."""

    commit: Commit
    nodes: tuple[tuple[str, ...], ...]
    """Ids of the nodes whose holders have each of the commit's files: its rank's, then the one with the copy."""

    @property
    def generation(self) -> str:
        """What its parts belong to."""
        return generation_of(self.commit)


def generation_of(commit: Commit) -> str:
    """Where the checkpoint's files would be, below `checkpoints/`, if they were in the store."""
    return f"{folder_name(commit.step)}/{owner_name(commit.claim, commit.attempt)}"


def nodes_of(held: HeldCheckpoint | None) -> set[str]:
    """Ids of all nodes that hold a part of it."""
    return {node for nodes in held.nodes for node in nodes} if held else set()


def find_holder(name: str) -> Any:
    """The handle of a holder.

    Raises:
        ValueError: There is none of that name.
    """
    import ray

    return ray.get_actor(name)


def answer_of(reply: Any) -> Any:
    """What a holder answers, once it does.

    Raises:
        FileNotFoundError: It does not hold what it was asked for.
        RayError: It is gone, or did not answer in time.
    """
    import ray

    return ray.get(reply, timeout=ANSWER_SECONDS)


class HolderReads:
    """Reads of one copy of each part of a memory checkpoint: the nearest to a rank, or the other.

    Owns: which holders did not answer; they are not asked again.
    Concurrency: safe to use from several threads.
    Blocking: every read, up to ANSWER_SECONDS.
    """

    def __init__(
        self,
        run_url: str,
        held: HeldCheckpoint,
        here: str,
        *,
        nearest: bool,
        find: Callable[[str], Any] = find_holder,
        answer: Callable[[Any], Any] = answer_of,
    ) -> None:
        """Choose the copies; asks nobody yet.

        Args:
            run_url: Of the run.
            held: The checkpoint.
            here: Id of the node of this process.
            nearest: Whether to read the copy on this node where there are two, or the one that this leaves.
            find: Gives a holder's handle by its name.
            answer: Waits for a reply.
        """
        self._run_url, self._generation, self._find, self._answer = run_url, held.generation, find, answer
        self._nodes: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._lost: set[str] = set()
        for file, nodes in zip(held.commit.files, held.nodes, strict=True):
            ordered = sorted(nodes, key=lambda node: node != here)
            name = _last(file.name)
            self._sizes[name] = file.bytes
            if chosen := ordered[:1] if nearest else ordered[1:]:
                self._nodes[name] = chosen[0]

    def read_range(self, url: str, offset: int, length: int) -> bytes:
        """Bytes of a file of the checkpoint; fewer where it ends before.

        Args:
            url: Where the file would be in the store.
            offset: Of the first byte.
            length: In bytes.

        Raises:
            FileNotFoundError: The holder has lost it, is gone, or does not answer; or there is no such copy.
        """
        node = self._nodes.get(_last(url))
        if node is None or node in self._lost:
            raise FileNotFoundError(url)
        try:
            holder = self._find(holder_name(self._run_url, node))
            data = self._answer(holder.read.remote(Part(self._generation, _last(url)), offset, length))
        except FileNotFoundError:
            raise
        except Exception as error:  # of Ray, of several kinds
            self._lost.add(node)
            logger.warning("memory checkpoints on node %s cannot be read: %s", node[:8], type(error).__name__)
            raise FileNotFoundError(url) from error
        return bytes(data)

    def size(self, url: str) -> int:
        """Bytes of a file, as the commit has it."""
        return self._sizes[_last(url)]


def _last(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def copies_of(run_url: str, held: HeldCheckpoint, here: str) -> Sequence[HolderReads]:
    """The ways to read a memory checkpoint from a node: the nearest copy of each part, then the other one."""
    return [HolderReads(run_url, held, here, nearest=nearest) for nearest in (True, False)]


def end_holders(run_url: str, nodes: Sequence[str]) -> None:
    """End the holders of nodes, with all that they have; a node that is drained goes only when nothing works on it."""
    import ray

    for node in nodes:
        with contextlib.suppress(Exception):  # it is gone
            ray.kill(find_holder(holder_name(run_url, node)))
