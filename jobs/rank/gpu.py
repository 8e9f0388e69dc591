"""What a rank on a GPU needs before it touches it, and what it checks then."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from jobs.errors import DeviceError
from jobs.recipe.recipe import Recipe

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_VARIABLES = {
    # One workspace for each stream: else cuBLAS may sum in another order ("Results reproducibility", its manual).
    _WORKSPACE: ":4096:8",
    # The last collectives of a group are kept, and written down when one is given up: by whom it was not reached.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    # A rank ends without aborting collectives whose other ranks are gone. Ray would set 1, which waits for them.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
}
_DUMPS = "TORCH_FR_DUMP_TEMP_FILE"


def gpu_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that CUDA and NCCL read when a rank's process first uses them; those of the user stay.

    Args:
        environ: The driver's.
    """
    dumps = Path(environ.get("TMPDIR") or tempfile.gettempdir()) / "convmae-nccl-rank-"
    return {name: environ.get(name, value) for name, value in {**_VARIABLES, _DUMPS: str(dumps)}.items()}


def check_untouched() -> None:
    """Check that nothing in this process has used CUDA yet, so that it will use the GPU that Ray gave it.

    Raises:
        DeviceError: Something has, perhaps while it was a standby.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        remedy = "an import of the rank's touched the GPU; train with standby=false, and report it"
        raise DeviceError("device", "must not be in use before Ray gives a rank its GPU", f"sees {visible}", remedy)


def check_given(device: torch.device, visible: str, given: Sequence[str]) -> None:
    """Check that a rank trains on the GPU that Ray gave it.

    Args:
        device: Where it is about to train.
        visible: CUDA_VISIBLE_DEVICES of its process.
        given: Ray's names of the GPUs that it gave.

    Raises:
        DeviceError: It would train on another one.
    """
    names = visible.split(",") if visible else []
    index = device.index or 0
    if not given or (names[index] if index < len(names) else None) not in given:
        remedy = "unset CUDA_VISIBLE_DEVICES in the run's environment: Ray sets it for each rank"
        rule = f"must be the one that Ray gave ({', '.join(given) or 'none'}), of CUDA_VISIBLE_DEVICES={visible}"
        raise DeviceError("device", rule, str(device), remedy)


def compute_as(recipe: Recipe) -> None:
    """Have this process compute as a recipe says: to the bit, and fp32 as such. Once, before a model is built.

    Without it cuDNN's convolutions round fp32 to TF32, and kernels that add atomically do so in any order; with it also
    the backward pass of attention is deterministic.
    """
    if recipe.device != "cuda":
        return
    if recipe.precision == "fp32":
        torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
    if recipe.is_exact:
        os.environ.setdefault(_WORKSPACE, _VARIABLES[_WORKSPACE])
        torch.use_deterministic_algorithms(True)
