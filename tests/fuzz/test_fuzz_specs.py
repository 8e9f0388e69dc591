"""Specs of ablations as people write them into files."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing import Fuzz, reading_only
from hypothesis import strategies as st
from mutations import ODD_TEXTS, changed_values, damaged, toml

from jobs.ablate.estimate import estimates, plan_rows, total_text
from jobs.ablate.spec import MOST_TRIALS, SPECS, Spec, base_files, spec_names
from jobs.recipe.recipe import Recipe
from jobs.run.directory import RUN_NAME
from pipeline.store.storage import Storage

Draw = Callable[[st.SearchStrategy[Any]], Any]

BASE = "cifar_small.toml"
SHIPPED = [tomllib.loads((SPECS / f"{name}.toml").read_text()) for name in spec_names()]
ODD_PARTS: dict[str, Any] = {
    "grid": {field: list(range(1, 41)) for field in ("epochs", "lanes", "model.kernel_size", "seed", "max_steps")},
    "variants": [{"name": "a", "base": "nope.toml"}, {"name": "a-seed0", "model": {"kernel_size": 7}}],
    "seeds": list(range(3000)),
    "recipe": {"model": {"preset": "mae_base"}, "finetune.mixup": 0.5},
    "evaluation": {"kind": "finetune", "data": "s3://bucket/val", "k": []},
}


@st.composite
def files(draw: Draw) -> bytes:
    """A shipped spec, with keys and values changed, large parts put in, and what editors and disks do."""
    document: Any = draw(st.sampled_from(SHIPPED))
    for name in draw(st.lists(st.sampled_from(sorted(ODD_PARTS)), max_size=2)):
        document = {**document, name: ODD_PARTS[name]}
    if draw(st.booleans()):
        document = draw(changed_values(document))
    elif draw(st.booleans()):
        document = {**document, "base": draw(st.sampled_from(("nope.toml", "a\0b.toml", "x" * 300 + ".toml", ".toml")))}
    keys = document.items() if isinstance(document, dict) else [("name", document)]
    lines = [f"{json.dumps(str(key))} = {toml(value)}" for key, value in keys]
    lines += draw(st.lists(st.sampled_from(("# a comment", "[grid]", "[[variants]]", *ODD_TEXTS)), max_size=1))
    text = "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")
    return draw(damaged(text)) if draw(st.booleans()) else text


def test_a_file_makes_an_ablation_or_is_refused(fuzz: Fuzz, tmp_path: Path) -> None:
    shutil.copy(SPECS / BASE, tmp_path)

    def spec_files(data: bytes) -> None:
        place = tmp_path / "mine.toml"
        place.write_bytes(data)
        with reading_only(tmp_path):
            spec = Spec.load(str(place))
            assert all(path.name == BASE for path in base_files(place))
        check_spec(spec)

    fuzz(spec_files, files(), batch=30)


def check_spec(spec: Spec) -> None:
    """An ablation's runs are distinct, valid and as many as there are variants and seeds; its plan can be looked at."""
    runs = [trial.run_name for trial in spec.trials]
    assert 0 < len(runs) == len(set(runs)) == len(spec.variants) * len(spec.file.seeds) <= MOST_TRIALS
    assert all(RUN_NAME.fullmatch(name) for name in runs)
    for trial in spec.trials[:50]:
        assert trial.recipe.seed == trial.seed
        assert Recipe.from_json(json.loads(json.dumps(trial.recipe.to_json()))) == trial.recipe
    if not any(trial.recipe.data for trial in spec.trials):
        found = estimates(Storage(), spec)
        assert all(isinstance(cell, str) for row in plan_rows(found) for cell in row) and total_text(found)
