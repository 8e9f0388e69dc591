"""One rank of `monitored_ranks`: the trainer of a run, whose calls to the monitor go over a socket in place of Ray."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from multiprocessing.connection import Client
from types import SimpleNamespace
from typing import Any

import ray
import torch
import torch.distributed as dist

from jobs.rank.trainer import Trainer, TrainJob
from jobs.run.directory import RunDirectory
from jobs.step.training_step import RankPlace
from pipeline.load import image_maker
from pipeline.store.storage import Storage

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
READ_SECONDS, DECODE_SECONDS = 1.0, 0.1
"""For a range to be read, one after the other, and for an image to be decoded."""


class Monitor:
    """Its handle: a method's `remote` calls it at once, and the reply is what it answered."""

    _local = threading.local()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *words, **named: self._call(name, words, named))

    def _call(self, name: str, words: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not hasattr(self._local, "connection"):
            self._local.connection = Client(os.environ["MONITOR"])
        self._local.connection.send_bytes(pickle.dumps((name, words, named)))
        is_answered, answer = pickle.loads(self._local.connection.recv_bytes())
        if not is_answered:
            raise answer
        return answer


class SlowStorage(Storage):
    """A store that serves one range after the other."""

    _lock = threading.Lock()

    def read_range(self, *words: Any, **named: Any) -> bytes:
        with self._lock:
            time.sleep(READ_SECONDS)
        return super().read_range(*words, **named)


def slow_decode(data: bytes, channels: int, bits: int) -> Any:
    time.sleep(DECODE_SECONDS)
    return decode(data, channels, bits)


def flipped(*words: Any, **named: Any) -> Any:
    """The gradients, with one bit of one element flipped."""
    gradients = grad(*words, **named)
    gradients[3].view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 3)
    return gradients


decode, grad = image_maker.decode, torch.autograd.grad


if __name__ == "__main__":
    torch.set_num_threads(1)
    ray.get = lambda reply, **_: reply  # type: ignore[assignment]
    ray.wait = lambda replies, **_: (replies, [])  # type: ignore[assignment]
    ray.get_runtime_context = lambda: SimpleNamespace(get_node_id=lambda: f"node-{RANK}")  # type: ignore[assignment]
    socket.gethostname = lambda: f"host-{RANK}"
    storage = SlowStorage() if os.environ["SLOW"] == "reading" else Storage()
    if os.environ["SLOW"] == "decoding":
        image_maker.decode = slow_decode
    if os.environ["SLOW"] == "flips":
        torch.autograd.grad = flipped
    dist.init_process_group("gloo", init_method=os.environ["MEETING_POINT"], rank=RANK, world_size=WORLD_SIZE)
    run = RunDirectory(storage, os.environ["RUN_URL"])
    job = TrainJob(run.read_recipe(), run, Monitor(), claim=0, driver="a test")  # type: ignore[arg-type]
    Trainer(job, RankPlace(RANK, WORLD_SIZE, torch.device("cpu"))).run()
    dist.destroy_process_group()
