from __future__ import annotations

import logging

import pytest
import torch
from rank_threads import Ranks

from jobs.checkpoint import rank_group
from jobs.checkpoint.rank_group import RankGroup
from jobs.rank import compute
from jobs.rank.compute import devices_text, group_compute
from jobs.recipe.named_recipes import named_recipe
from model.cost import classifier_flops, flops
from model.device_peak import DevicePeak

NOWHERE = RankGroup(device="meta")
"""A device without a peak, so that nothing is measured."""


def test_a_pretraining_computes_its_views_in_grains() -> None:
    recipe = named_recipe("fastconvmae_base").amended({"grain_size": 8})

    step = group_compute(recipe, NOWHERE, 10).step_flops

    assert step == flops(recipe.model, 8).training * recipe.global_batch_size / 8
    once = recipe.amended({"model.views": 1, "grain_size": 32, "micro_batch_size": 32, "lanes": 16, "max_workers": 16})
    assert step == pytest.approx(4 * group_compute(once, NOWHERE, 10).step_flops)


def test_operations_are_named_by_the_step_from_which_images_have_another_size() -> None:
    plain = named_recipe("tiny").amended({"epochs": 10, "warmup_epochs": 1})
    recipe = plain.amended({"resolution_schedule": [[0, 64], [0.7, 128]]})
    small = recipe.resolutions[0].model

    found, of_one = (group_compute(each, NOWHERE, 10) for each in (recipe, plain))

    batch, grain = recipe.global_batch_size, recipe.grain
    expected = round(flops(small, grain).training * batch / grain)
    assert found.step_flops_from == ((1, expected), (71, of_one.step_flops))
    assert (found.step_flops, of_one.step_flops_from) == (of_one.step_flops, ())
    assert "step_flops_from" not in of_one.to_json()


def test_without_grains_it_computes_in_micro_batches() -> None:
    recipe = named_recipe("tiny").amended({"reproducible": "rounding", "micro_batch_size": 16})

    step = group_compute(recipe, NOWHERE, 10).step_flops

    assert step == flops(recipe.model, 16).training * recipe.global_batch_size / 16


@pytest.mark.parametrize(("name", "kind"), [("tiny_finetune", "full"), ("tiny_linear", "linear")])
def test_a_finetuning_computes_a_classifier_of_its_classes(name: str, kind: str) -> None:
    recipe = named_recipe(name).amended({"finetune.classes": ["a", "b", "c"]})

    step = group_compute(recipe, NOWHERE, 10).step_flops

    assert step == pytest.approx(classifier_flops(recipe.model, recipe.global_batch_size, 3, kind).training)


def test_the_peak_of_a_cpu_is_measured_in_the_precision_of_the_run() -> None:
    threads = torch.get_num_threads()

    found = group_compute(named_recipe("tiny").amended({"precision": "fp32"}), RankGroup(), 10)

    assert found.peak_flops_per_second and found.peak_flops_per_second > 1e8
    assert found.devices == f"1 x CPU, {threads} thread{'s' * (threads > 1)} (measured)"


def test_the_peaks_of_all_ranks_are_added_up_and_all_know_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"cpu": DevicePeak("A10", 1e12, False), "meta": DevicePeak("L4", 2e12, False)}
    ranks = Ranks(3)
    monkeypatch.setattr(rank_group, "dist", ranks)
    monkeypatch.setattr(compute, "device_peak", lambda device, dtype: known[device.type])

    found = ranks.run(
        lambda rank: group_compute(named_recipe("tiny"), RankGroup(rank, 3, "cpu" if rank else "meta"), 10)
    )

    assert [each.peak_flops_per_second for each in found] == [4e12] * 3
    assert {each.devices for each in found} == {"1 x L4 (data sheet); 2 x A10 (data sheet)"}


def test_a_device_that_cannot_be_measured_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = group_compute(named_recipe("tiny"), NOWHERE, 10)

    assert found.peak_flops_per_second is None
    assert found.devices == "1 x device of unknown peak"
    assert "the peak of meta could not be measured" in caplog.text


def test_devices_of_several_kinds_are_counted_and_named() -> None:
    fast, slow = DevicePeak("H100", 1e15, False), DevicePeak("CPU, 1 thread", 1e11, True)

    assert devices_text([fast, slow, fast, None]) == (
        "2 x H100 (data sheet); 1 x CPU, 1 thread (measured); 1 x device of unknown peak"
    )
