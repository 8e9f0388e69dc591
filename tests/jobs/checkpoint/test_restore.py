"""Which checkpoint is resumed from and what each rank gets of it, with ranks in threads; with real ones in
test_zero_state."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from counting_storage import CountingStorage
from rank_threads import Ranks
from zero_material import Material, commit_state, commit_zero_files, random_material, write_zero_files

from jobs.checkpoint import checkpoint, rank_group, state_reading
from jobs.checkpoint.rank_group import RankGroup
from jobs.checkpoint.restore import Restored, restore_newest
from jobs.checkpoint.zero_state import owned_ranges
from jobs.errors import CheckpointError
from jobs.recipe.named_recipes import named_recipe
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

STEPS = (10, 20, 30)
CHUNK_BYTES = 1 << 10
MATERIAL = random_material(9000, tensor_elements=2500)
MODEL_STATES, OPTIMIZER_STATES = "_model_states.pt", "_optim_states.pt"


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Restored | None], list[tuple[int, str]]]]:
    """Restores on all ranks: what each got, and what was reported on rank 0."""

    def restored(
        run: RunDirectory, world_size: int = 2, stage: int = 2, material: Material = MATERIAL
    ) -> tuple[list[Restored | None], list[tuple[int, str]]]:
        ranks, passed_over = Ranks(world_size), []
        monkeypatch.setattr(rank_group, "dist", ranks)
        found = ranks.run(
            lambda rank: restore_newest(
                run, owned(material, stage, rank, world_size), RankGroup(rank, world_size),
                check=lambda commit: None, on_damage=lambda step, why, source: passed_over.append((step, why)),
            )
        )  # fmt: skip
        return found, passed_over

    return restored


def owned(material: Material, stage: int, rank: int, world_size: int) -> dict[str, range]:
    model: Any = SimpleNamespace(named_parameters=lambda: [pair for group in material.groups for pair in group.items()])
    groups = [{"params": list(group.values())} for group in material.groups]
    return owned_ranges(model, groups, stage=stage, rank=rank, world_size=world_size)


def make_run(
    folder: Path, stage: int = 2, world_size: int = 2, material: Material = MATERIAL, *, steps: tuple[int, ...] = (30,)
) -> RunDirectory:
    run = RunDirectory.of(Storage(), str(folder / "runs"), "first")
    for step in steps:
        commit_state(
            run, named_recipe("tiny"), material, step=step, stage=stage, world_size=world_size, chunk_bytes=CHUNK_BYTES
        )
    return run


def make_older_run(
    folder: Path, stage: int = 2, world_size: int = 2, material: Material = MATERIAL, *, steps: tuple[int, ...] = (30,)
) -> RunDirectory:
    """As format 3 had it: DeepSpeed's own files."""
    run = RunDirectory.of(Storage(), str(folder / "runs"), "older")
    write_zero_files(folder / "local", material, stage, world_size)
    for step in steps:
        commit_zero_files(
            run, named_recipe("tiny"), folder / "local", step=step, stage=stage, world_size=world_size,
            chunk_bytes=CHUNK_BYTES,
        )  # fmt: skip
    return run


MAKERS = [pytest.param(make_run, id="ours"), pytest.param(make_older_run, id="DeepSpeed's")]


@pytest.fixture(params=MAKERS)
def run(tmp_path: Path, request: pytest.FixtureRequest) -> RunDirectory:
    made: RunDirectory = request.param(tmp_path, steps=STEPS)
    return made


@pytest.fixture
def older_run(tmp_path: Path) -> RunDirectory:
    return make_older_run(tmp_path, steps=STEPS)


def files_of(run: RunDirectory, step: int) -> list[Path]:
    return [Path(checkpoint.file_url(run, step, file.name)) for file in checkpoint.read_commit(run, step).files]


def commit_of(run: RunDirectory, step: int) -> Path:
    return Path(run.path("commits", f"{checkpoint.folder_name(step)}.json"))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def assert_restored(found: Restored | None, material: Material, mine: Mapping[str, range]) -> None:
    assert found is not None
    state = found.state
    trained = {name: value for group in material.groups for name, value in group.items()}
    expected = {
        **trained,
        **material.frozen,
        **{n: b.float() if b.is_floating_point() else b for n, b in material.buffers.items()},
    }
    assert state.weights.keys() == expected.keys()
    for name, value in expected.items():
        assert state.weights[name].shape == value.shape
        assert torch.equal(state.weights[name], value), name
    assert state.owned == mine
    for name, values in mine.items():
        flat = trained[name].reshape(-1)[values.start : values.stop]
        assert torch.equal(state.moments["exp_avg"][name], flat * 0.5), name
        assert torch.equal(state.moments["exp_avg_sq"][name], flat.square()), name
    assert state.optimizer_step == 2.0


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("before", "now"), [(1, 1), (1, 4), (2, 3), (3, 2), (7, 1), (4, 2), (7, 5), (2, 16)])
def test_every_rank_gets_the_weights_and_its_share_bit_for_bit(
    tmp_path: Path, together: Any, stage: int, before: int, now: int, make: Any
) -> None:
    run = make(tmp_path, stage, before)

    found, passed_over = together(run, now, stage)

    assert passed_over == []
    for rank in range(now):
        assert_restored(found[rank], MATERIAL, owned(MATERIAL, stage, rank, now))


@pytest.fixture
def _moments_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the ranks would read too much, if each read the moments that it owns; in buckets of a tensor or two."""
    monkeypatch.setattr(state_reading, "READ_AGAIN", 0)
    for module in (state_reading, rank_group):
        monkeypatch.setattr(module, "BUCKET_BYTES", 1 << 14)


@pytest.mark.usefixtures("_moments_of_all")
@pytest.mark.parametrize(("before", "now", "stage"), [(1, 4, 3), (2, 3, 1), (7, 5, 3), (4, 2, 2)])
def test_moments_that_all_read_together_are_the_same_bit_for_bit(
    tmp_path: Path, together: Any, before: int, now: int, stage: int
) -> None:
    run = make_run(tmp_path, stage, before)

    found, _ = together(run, now, stage)

    for rank in range(now):
        assert_restored(found[rank], MATERIAL, owned(MATERIAL, stage, rank, now))


@pytest.mark.usefixtures("_moments_of_all")
def test_damage_to_moments_that_all_read_together_is_found_by_all(tmp_path: Path, together: Any) -> None:
    run = make_run(tmp_path, stage=3, world_size=1, steps=(20, 30))
    (path,) = files_of(run, 30)
    moments_begin = checkpoint.read_commit(run, 30).files[0].bytes // 2

    for offset in range(moments_begin, path.stat().st_size, 20 * CHUNK_BYTES):
        flip(path, offset)
        found, passed_over = together(run, 4, 3)
        flip(path, offset)

        assert [restored.commit.step for restored in found] == [20] * 4
        assert [(step, str(path) in why) for step, why in passed_over] == [(30, True)]


@pytest.mark.parametrize(("before", "now"), [(1, 8), (2, 8), (8, 2), (16, 16)])
@pytest.mark.parametrize("stage", [1, 3])
def test_all_ranks_together_read_little_more_than_the_checkpoint(
    tmp_path: Path, together: Any, stage: int, before: int, now: int
) -> None:
    material = random_material(200_000, tensor_elements=40_000)
    run = make_run(tmp_path, stage, before, material)
    run, total = RunDirectory(CountingStorage(), run.url), checkpoint.read_commit(run, 30).bytes
    CountingStorage.forget()

    together(run, now, stage, material)

    surplus = (now + len(files_of(run, 30))) * 16 * CHUNK_BYTES  # headers, chunks at the ends of ranges
    assert total <= CountingStorage.read_bytes < total + surplus


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("stage", "before"), [(2, 2), (3, 3)])
def test_a_flipped_byte_anywhere_is_found_by_some_rank(
    tmp_path: Path, together: Any, caplog: pytest.LogCaptureFixture, stage: int, before: int, make: Any
) -> None:
    """Weights, moments and headers; of DeepSpeed's files also padding, weights that are never restored, directories."""
    run = make(tmp_path, stage, before)
    places = [
        (path, offset)
        for path in files_of(run, 30)
        for offset in [*range(7, path.stat().st_size, CHUNK_BYTES), path.stat().st_size - 1]
    ]
    assert len(places) > 100

    for path, offset in places:
        flip(path, offset)
        with pytest.raises(CheckpointError, match="must be whole, and none is"):
            together(run, stage=stage)
        flip(path, offset)
        assert str(path) in caplog.text, offset
        caplog.clear()

    assert all(together(run, stage=stage)[0])


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (Path.unlink, "it is missing"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes, not"),
        (lambda path: os.truncate(path, path.stat().st_size + 1), "bytes, not"),
        (lambda path: os.truncate(path, 0), "bytes, not"),
    ],
    ids=["missing", "truncated", "longer", "emptied"],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_file_is_found_and_named(
    run: RunDirectory, together: Any, number: int, damage: Any, what: str
) -> None:
    path = files_of(run, 30)[number]
    damage(path)

    found, passed_over = together(run)

    assert [restored.commit.step for restored in found] == [20, 20]
    ((step, why),) = passed_over
    assert (step, what in why, str(path) in why, len(why.splitlines())) == (30, True, True, 1)


def test_a_file_that_changes_after_its_size_was_seen_is_found(run: RunDirectory, together: Any) -> None:
    class Shrinking(Storage):
        """Its files are shorter than it says."""

        def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
            return super().read_range(url, offset, length, etag)[: -1 if "step-00000030" in url else length]

    found, passed_over = together(RunDirectory(Shrinking(), run.url))

    assert [restored.commit.step for restored in found] == [20, 20]
    assert "it ends before byte" in passed_over[0][1]


def test_it_is_the_newest_where_all_are_whole(run: RunDirectory, together: Any) -> None:
    found, passed_over = together(run)

    assert [restored.commit.step for restored in found] == [30, 30]
    assert passed_over == []


def test_damaged_ones_are_skipped_and_reported(run: RunDirectory, together: Any) -> None:
    flip(files_of(run, 30)[-1], 5000)  # in the chunk that begins at 4096
    commit_of(run, 20).write_text(commit_of(run, 20).read_text()[:-9])

    found, passed_over = together(run)

    assert [restored.commit.step for restored in found] == [10, 10]
    assert [step for step, _ in passed_over] == [30, 20]
    assert "it was altered at 4096" in passed_over[0][1]
    assert str(files_of(run, 30)[-1]) in passed_over[0][1]
    assert "must be a JSON object" in passed_over[1][1]


def test_if_none_is_whole_no_run_starts_from_zero(run: RunDirectory, together: Any) -> None:
    for step in STEPS:
        files_of(run, step)[0].unlink()

    with pytest.raises(CheckpointError, match="must be whole, and none is, got '10, 20, 30'"):
        together(run)


def test_another_format_is_refused_not_skipped(run: RunDirectory, together: Any) -> None:
    fields = dataclasses.asdict(checkpoint.read_commit(run, 30)) | {"format_version": 9}
    commit_of(run, 30).write_text(json.dumps(fields))

    with pytest.raises(CheckpointError, match="format_version: must be 1, 2, 3 or 4, got 9"):
        together(run)


def test_before_the_first_commit_there_is_none(tmp_path: Path, together: Any) -> None:
    found, passed_over = together(RunDirectory.of(Storage(), str(tmp_path / "empty"), "new"))

    assert found == [None, None]
    assert passed_over == []


def test_a_commit_without_checksums_of_chunks_is_restored_and_its_files_are_checked(
    older_run: RunDirectory, together: Any
) -> None:
    """As the first release wrote them."""
    run = older_run
    for step in STEPS:
        fields = json.loads(commit_of(run, step).read_text()) | {"format_version": 1}
        del fields["claim"], fields["driver"], fields["digest"]
        for file in fields["files"]:
            del file["chunk_bytes"], file["chunk_crc32cs"]
        commit_of(run, step).write_text(json.dumps(fields))

    found, _ = together(run, 3)

    for rank in range(3):
        assert_restored(found[rank], MATERIAL, owned(MATERIAL, 2, rank, 3))
    flip(files_of(run, 30)[-1], 5000)
    files_of(run, 20)[0].unlink()
    found, passed_over = together(run, 3)
    assert [restored.commit.step for restored in found] == [10, 10, 10]
    assert "it was altered" in passed_over[0][1]
    assert "it is missing" in passed_over[1][1]


def amended(run: RunDirectory, folder: Path, suffix: str, amend: Callable[[Any], Any], world_size: int = 2) -> None:
    """Commit the same checkpoint once more, with something else in the files whose names end in `suffix`."""
    for path in (folder / "local").glob(f"*{suffix}"):
        contents = torch.load(path, weights_only=False)
        amend(contents)
        torch.save(contents, path)
    commit_zero_files(run, named_recipe("tiny"), folder / "local", step=40, stage=2, world_size=world_size)


def padded(contents: Any) -> None:
    """With `parameter_alignment`, DeepSpeed pads after each parameter of a group but the last."""
    state = contents["optimizer_state_dict"]
    paddings = [[3 + number % 5 for number in range(len(group) - 1)] + [0] for group in MATERIAL.groups]
    state["param_alignment_paddings"] = paddings
    inner = state["base_optimizer_state"]["state"]
    for index, (group, behind) in enumerate(zip(MATERIAL.groups, paddings, strict=True)):
        pairs = zip(group.values(), behind, strict=True)
        flat = torch.cat([torch.nn.functional.pad(value, (0, padding)) for value, padding in pairs])
        flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2))
        state["single_partition_of_fp32_groups"][index] = flat
        inner[index] |= {"exp_avg": flat * 0.5, "exp_avg_sq": flat.square()}


def test_padding_between_parameters_is_skipped(tmp_path: Path, together: Any) -> None:
    run = make_older_run(tmp_path, world_size=1)
    amended(run, tmp_path, OPTIMIZER_STATES, padded, world_size=1)

    found, _ = together(run)

    for rank in range(2):
        assert found[rank].commit.step == 40
        assert_restored(found[rank], MATERIAL, owned(MATERIAL, 2, rank, 2))


def other_optimizer(contents: Any) -> None:
    for group in contents["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        group["momentum_buffer"] = group.pop("exp_avg_sq")


def no_optimizer(contents: Any) -> None:
    contents["optimizer_state_dict"]["base_optimizer_state"]["state"].clear()


@pytest.mark.parametrize(
    ("suffix", "amend", "rule"),
    [
        (MODEL_STATES, lambda found: found.update(mp_world_size=2), "must be without tensor parallelism"),
        (MODEL_STATES, lambda found: found.update(num_experts=[4]), "must be without mixture of experts"),
        (
            MODEL_STATES,
            lambda found: found.update(
                ds_config={"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
            ),
            "must be without offload",
        ),
        (OPTIMIZER_STATES, other_optimizer, "must be of AdamW.*exp_avg, momentum_buffer, step for 2 of 2"),
        (OPTIMIZER_STATES, no_optimizer, "must be of AdamW.*nothing for 0 of 2"),
        (
            OPTIMIZER_STATES,
            lambda found: found["optimizer_state_dict"].pop("single_partition_of_fp32_groups"),
            "must be of ZeRO 1, 2 or 3",
        ),
    ],
    ids=["tensor parallelism", "experts", "offload", "other optimizer", "no optimizer", "no ZeRO"],
)
def test_what_is_not_handled_is_refused_by_name(
    older_run: RunDirectory, together: Any, tmp_path: Path, suffix: str, amend: Any, rule: str
) -> None:
    run = older_run
    amended(run, tmp_path, suffix, amend)

    with pytest.raises(CheckpointError, match=rule):
        together(run)


def test_another_model_is_refused_by_the_name_of_its_parameter(run: RunDirectory, together: Any) -> None:
    groups = [{"head": torch.zeros(3), **MATERIAL.groups[0]}, MATERIAL.groups[1]]

    with pytest.raises(CheckpointError, match="must hold exp_avg of head"):
        together(run, material=dataclasses.replace(MATERIAL, groups=groups))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda fields: fields["files"][0]["trained"].pop(), "list each value of"),
        (lambda fields: fields["files"][1]["trained"].append(fields["files"][0]["trained"][0]), "list each value of"),
        (
            lambda fields: fields["files"][0]["trained"][0].__setitem__(0, 99),
            "list ranges of the tensors that it names",
        ),
        (lambda fields: fields["files"][0]["trained"][0].__setitem__(2, 0), "list ranges of the tensors that it names"),
        (lambda fields: fields["files"][0].update(data_offset=8), "say what each byte of rank-00000.safetensors is"),
        (lambda fields: fields["tensors"].append(fields["tensors"][0] | {"name": "new"}), "say where new lies"),
        (lambda fields: fields["tensors"][0].update(dtype="F16"), "hold weight.0, which is trained, as F32"),
        (lambda fields: fields["tensors"][0].update(dtype="F7"), "give a known dtype for weight.0"),
        (lambda fields: fields["tensors"][0].update(shape=[7]), "list each value of weight.0 once"),
        (
            lambda fields: fields["tensors"].append({"name": "tied", "shape": [1], "dtype": "F32", "same_as": "gone"}),
            "say where tied lies",
        ),
    ],
    ids=["a gap", "twice", "of no tensor", "empty", "offset", "unplaced", "half", "unknown dtype", "shape", "alias"],
)
def test_a_commit_whose_map_does_not_fit_its_files_is_skipped_by_name(
    tmp_path: Path, together: Any, change: Any, what: str
) -> None:
    run = make_run(tmp_path, steps=(20, 30))
    fields = json.loads(commit_of(run, 30).read_text())
    change(fields)
    commit_of(run, 30).write_text(json.dumps(fields))

    found, passed_over = together(run)

    assert [restored.commit.step for restored in found] == [20, 20]
    ((step, why),) = passed_over
    assert (step, f"commit: must {what}" in why) == (30, True)


def test_a_tied_parameter_comes_under_both_names(tmp_path: Path, together: Any) -> None:
    run = make_run(tmp_path)
    fields = json.loads(commit_of(run, 30).read_text())
    fields["tensors"].append(fields["tensors"][0] | {"name": "tied", "same_as": "weight.0"})
    commit_of(run, 30).write_text(json.dumps(fields))

    found, _ = together(run)

    assert torch.equal(found[1].state.weights["tied"], MATERIAL.groups[0]["weight.0"])
