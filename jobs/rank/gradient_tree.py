"""Gradients whose bits depend on no world size: fixed grains of the global batch, added in one fixed tree.

Floating-point addition is not associative, so a sum over ranks depends on how many there are. Here the global batch is
cut into G grains, whatever the world size, and the gradient is the sum of the grains' gradients in the shape of one
binary tree over [0, G): the sum of a node is that of its left half plus that of its right half. A rank adds up the
nodes that lie within its own grains; the owner of a partition of the parameters gets every rank's nodes of it and adds
these in the tree's order. Where world size and G are powers of two each rank has one node, and what travels is what a
reduce-scatter would send. The idea is that of reproducible summation by a fixed tree; EasyScale (arXiv:2208.14228)
fixes virtual ranks for the same end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Node(NamedTuple):
    """The grains [start, start + 2**height) of the tree, or what there is of them."""

    start: int
    height: int

    def halves(self) -> tuple[Node, Node]:
        """Its two children."""
        height = self.height - 1
        return Node(self.start, height), Node(self.start + (1 << height), height)


def root(grains: int) -> Node:
    """The whole tree over `grains` grains."""
    return Node(0, (grains - 1).bit_length())


def nodes_of(grains: range) -> list[Node]:
    """The fewest nodes that make up some consecutive grains, in their order: what a rank with these ends up with."""
    nodes: list[Node] = []
    for grain in grains:
        nodes.append(Node(grain, 0))
        while len(nodes) > 1 and _are_siblings(*nodes[-2:]):
            nodes[-2:] = [Node(nodes[-2].start, nodes[-2].height + 1)]
    return nodes


def _are_siblings(left: Node, right: Node) -> bool:
    return left.height == right.height and left.start % (2 << left.height) == 0


class PartialSums:
    """What a rank has added up of the tree: a vector for each node, as few as can be.

    Owns: one vector for each node that is open, which are used again step by step; at most two for each level.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        """Make no room yet.

        Args:
            numel: Elements of a vector.
            device: Where they lie.
        """
        self._numel, self._device = numel, device
        self._open: list[tuple[Node, Tensor]] = []
        self._spare: list[Tensor] = []

    def add(self, grain: int, fill: Callable[[Tensor], None]) -> None:
        """Add the next grain's gradient.

        Args:
            grain: Its number; one more than that of the last.
            fill: Writes it into a vector; what it leaves alone stays 0.
        """
        vector = self._spare.pop() if self._spare else torch.zeros(self._numel, device=self._device)
        fill(vector)
        self._open.append((Node(grain, 0), vector))
        while len(self._open) > 1 and _are_siblings(self._open[-2][0], self._open[-1][0]):
            (_, right), (node, left) = self._open.pop(), self._open.pop()
            left.add_(right)
            self._spare.append(right)
            self._open.append((Node(node.start, node.height + 1), left))

    def vectors(self) -> Sequence[tuple[Node, Tensor]]:
        """The sums of the nodes that are there, in their order."""
        return self._open

    def clear(self) -> None:
        """Forget the sums; their room is kept."""
        self._spare += [vector for _, vector in self._open]
        self._open = []


def add_tree(grains: int, sums: Mapping[Node, Tensor]) -> Tensor:
    """The sum over all grains, from sums of nodes that cover them; may be one of these, changed in place.

    Args:
        grains: How many there are.
        sums: By node; none within another.
    """
    total = _added(root(grains), grains, sums)
    assert total is not None
    return total


def _added(node: Node, grains: int, sums: Mapping[Node, Tensor]) -> Tensor | None:
    """Depth first, so that few sums are held; None for what lies beyond the last grain."""
    if node in sums:
        return sums[node]
    if node.start >= grains:
        return None
    left, right = (_added(half, grains, sums) for half in node.halves())
    assert left is not None
    return left if right is None else left.add_(right)


class Exchange:
    """Brings every rank's nodes of a partition to the rank that owns it. Collective."""

    def __init__(self, grains_by_rank: Sequence[range], partition_numels: Sequence[int]) -> None:
        """Lay out who sends what; the same on all ranks.

        Args:
            grains_by_rank: The grains of each rank, in order, together [0, G).
            partition_numels: Of each group of parameters, the elements that every rank owns; a vector is the groups
                in turn, each with its ranks' partitions in turn.
        """
        self._grains = grains_by_rank[-1].stop
        self._nodes = [nodes_of(grains) for grains in grains_by_rank]
        self._numels = partition_numels

    def gather(self, sums: Sequence[tuple[Node, Tensor]]) -> list[Tensor]:
        """This rank's partition of the sum over all grains, for each group.

        Args:
            sums: Of this rank's nodes, as `PartialSums` has them; those of a rank that is alone are changed in place.
        """
        world_size, first = len(self._nodes), 0
        partitions = []
        for numel in self._numels:
            parts = [vector[first : first + numel * world_size] for _, vector in sums]
            partitions.append(add_tree(self._grains, dict(self._received(parts, numel))))
            first += numel * world_size
        return partitions

    def _received(self, parts: Sequence[Tensor], numel: int) -> Iterator[tuple[Node, Tensor]]:
        """Every node's part of this rank's partition of one group, in as many rounds as a rank has nodes at most."""
        world_size = len(self._nodes)
        if world_size == 1:
            yield from zip(self._nodes[0], parts, strict=True)
            return
        for turn in range(max(map(len, self._nodes))):
            senders = [rank for rank, nodes in enumerate(self._nodes) if turn < len(nodes)]
            sent = parts[turn] if turn < len(parts) else parts[0][:0]
            got = sent.new_empty(numel * len(senders))
            from_each = [numel if rank in senders else 0 for rank in range(world_size)]
            dist.all_to_all_single(got, sent, from_each, [len(sent) // world_size] * world_size)
            for rank, part in zip(senders, got.view(len(senders), numel), strict=True):
                yield self._nodes[rank][turn], part
