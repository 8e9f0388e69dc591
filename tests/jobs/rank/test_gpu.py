"""What a rank on a GPU is given and checks; what needs one is in tests/gpu."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from jobs.errors import DeviceError
from jobs.rank.gpu import check_given, check_untouched, compute_as, gpu_environment
from jobs.rank.process_group import MARGIN_SECONDS, RanksOverNodes
from jobs.rank.standby import rank_environment
from jobs.recipe.named_recipes import named_recipe


@pytest.mark.parametrize(
    ("device", "visible", "given", "is_right"),
    [
        ("cuda:0", "3", ["3"], True),
        ("cuda:2", "0,1,2,3", ["2"], True),
        ("cuda:0", "GPU-1f,GPU-2e", ["GPU-1f"], True),
        ("cuda:0", "0,1,2,3", ["2"], False),
        ("cuda:4", "0,1,2,3", ["0"], False),
        ("cuda:0", "", ["0"], False),
        ("cuda:0", "0", [], False),
    ],
)
def test_a_rank_trains_on_the_gpu_that_ray_gave_it_or_not_at_all(
    device: str, visible: str, given: list[str], is_right: bool
) -> None:
    if is_right:
        check_given(torch.device(device), visible, given)
        return
    with pytest.raises(DeviceError, match=f"device: must be the one that Ray gave .* got '{device}'; unset CUDA_VIS"):
        check_given(torch.device(device), visible, given)


def test_a_process_that_has_used_cuda_becomes_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    check_untouched()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    with pytest.raises(DeviceError, match="must not be in use before Ray gives a rank its GPU"):
        check_untouched()


def test_ranks_on_gpus_record_collectives_and_compute_deterministically() -> None:
    mine = {"TORCH_FR_BUFFER_SIZE": "7", "TMPDIR": "/scratch", "HOME": "/home/me"}

    found = rank_environment(mine, "cuda", 4.0, standby=False)

    assert found == {
        "DS_ACCELERATOR": "cuda",
        "OMP_NUM_THREADS": "4",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TORCH_FR_BUFFER_SIZE": "7",
        "TORCH_FR_DUMP_TEMP_FILE": "/scratch/convmae-nccl-rank-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    }
    assert gpu_environment({})["TORCH_FR_BUFFER_SIZE"] == "2000"


@pytest.fixture
def as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize(
    ("changes", "deterministic", "precision"),
    [
        ({"device": "cuda"}, True, "ieee"),
        ({"device": "cuda", "precision": "bf16"}, True, "none"),
        ({"device": "cuda", "reproducible": "rounding"}, False, "ieee"),
        ({"device": "cpu"}, False, "none"),
    ],
)
def test_a_gpu_computes_as_the_recipe_says(changes: dict[str, str], deterministic: bool, precision: str) -> None:
    compute_as(named_recipe("tiny").amended({"precision": "fp32", **changes}))

    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert torch.backends.fp32_precision == precision  # type: ignore[attr-defined]


def test_a_collective_outlasts_whatever_a_rank_may_take_for_its_part() -> None:
    recipe = named_recipe("tiny").amended({"hang_seconds": 900.0, "stall_seconds": 60.0})

    assert RanksOverNodes.of(recipe).timeout_s == 900 + MARGIN_SECONDS
    assert RanksOverNodes.of(recipe.amended({"compile": True})).timeout_s > 1800
