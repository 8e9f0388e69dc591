"""The encoder that is evaluated, as tasks get it: a value with its image size, known by a digest.

Letters: B images, H and W pixels, C channels.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jobs.errors import EvaluationError
from jobs.weights.weight_checks import check_finite
from jobs.weights.weight_files import model_json
from model import ConvMAEConfig, PooledEncoder, normalise
from pipeline.image.decode import Pixels

DEVICES = ("auto", "cpu", "cuda")
ENCODER = "encoder."
"""Prefix of the encoder's weights among ours."""

Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FrozenEncoder:
    """An encoder's weights, and how images are given to it. Picklable."""

    config: ConvMAEConfig
    arrays: Mapping[str, Float32s]
    """Of `PooledEncoder(config).encoder`, by name."""
    image_shape: tuple[int, int]
    """H and W of the images, to which positions are interpolated."""
    digest: str
    """SHA-256 of all the others."""

    @classmethod
    def of(
        cls, config: ConvMAEConfig, state: Mapping[str, Tensor], image_shape: tuple[int, int], value: str
    ) -> FrozenEncoder:
        """Take the encoder out of a whole model's weights.

        Args:
            config: Of the model.
            state: By our names; what belongs to the decoder may be missing.
            image_shape: H and W of the images.
            value: Where the weights come from, for the message.

        Raises:
            WeightsFileError: A weight is not finite.
        """
        with torch.device("meta"):
            wanted = PooledEncoder(config).encoder.state_dict()
        tensors = {name: state[f"{ENCODER}{name}"] for name in wanted}
        check_finite(tensors.items(), value)
        arrays = {name: tensor.detach().cpu().float().contiguous().numpy() for name, tensor in tensors.items()}
        digest = hashlib.sha256(f"{model_json(config)} {image_shape}".encode())
        for name in sorted(arrays):
            digest.update(name.encode() + arrays[name].tobytes())
        return cls(config, arrays, image_shape, digest.hexdigest())

    @property
    def channels(self) -> int:
        """C."""
        return self.config.embed_dim[2]

    def built(self, device: str) -> PooledEncoder:
        """The module, in evaluation mode; the last one that this process built is kept."""
        return _built(_Keyed(self), device)


@dataclass(frozen=True)
class _Keyed:
    """An encoder that is equal to another one of the same digest."""

    encoder: FrozenEncoder

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.encoder.digest == other.encoder.digest

    def __hash__(self) -> int:
        return hash(self.encoder.digest)


@lru_cache(maxsize=1)
def _built(keyed: _Keyed, device: str) -> PooledEncoder:
    model = PooledEncoder(keyed.encoder.config)
    # Copies: what Ray hands to a task is read-only memory.
    model.encoder.load_state_dict(
        {name: torch.tensor(array, device="cpu") for name, array in keyed.encoder.arrays.items()}
    )
    return model.eval().requires_grad_(False).to(device)


def encode(encoder: FrozenEncoder, pixels: Pixels, device: str) -> Float32s:
    """Features of one batch, (B, C), in fp32; the same bits for the same batch, device, thread count and release.

    Args:
        encoder: Gives them.
        pixels: (B, 3, H, W) uint8.
        device: `cpu` or `cuda`.

    Raises:
        EvaluationError: A feature is infinite or not a number.
    """
    model = encoder.built(device)
    with torch.inference_mode(), exactly(device):
        found: Float32s = model(normalise(torch.from_numpy(pixels).to(device))).cpu().numpy()
    if not np.isfinite(found).all():
        rule = "must give finite features in fp32"
        raise EvaluationError("weights", rule, f"{(~np.isfinite(found)).any(1).sum()} that are not", "use others")
    return found


def chosen_device(name: str, *, has_gpu: bool) -> str:
    """`cpu` or `cuda`.

    Args:
        name: One of DEVICES.
        has_gpu: Whether this machine, or the cluster, has a GPU.

    Raises:
        EvaluationError: It is none of DEVICES, or there is no GPU.
    """
    if name not in DEVICES:
        raise EvaluationError("--device", f"must be one of {', '.join(DEVICES)}", name, "choose one of them")
    if name == "cuda" and not has_gpu:
        raise EvaluationError("--device", "must be there", name, "give --device cpu")
    return "cuda" if has_gpu and name != "cpu" else "cpu"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread of PyTorch for each operation: sums in another number of threads may differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def exactly(device: str) -> Iterator[None]:
    """On a GPU: fp32 as such, not TF32, by kernels that give the same bits each time."""
    if device == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may sum in another order
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    flags: Any = torch.backends.flags
    try:
        with flags(fp32_precision="ieee"):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
