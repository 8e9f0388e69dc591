"""The pages of docs/: files, links and tests that they name exist, and their tables are those of the code."""

from __future__ import annotations

import json
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from manifests import ROOT

from jobs.recipe.placement import PLACEMENT_FIELDS
from jobs.recipe.recipe import Recipe

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "infra" / "README.md", ROOT / "examples" / "README.md"]
FOLDERS = "jobs|pipeline|model|tests|infra|benchmarks|examples|docs"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def section(page: str, title: str) -> str:
    return (ROOT / "docs" / page).read_text().partition(f"# {title}\n")[2].partition("\n#")[0]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(rf"`((?:{FOLDERS})/[\w./*-]*)`", prose(page))

    assert [path for path in named if not any(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)

    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    files = [*(ROOT / "tests").rglob("test_*.py")]
    known = {file.stem for file in files}
    known |= {test for file in files for test in re.findall(r"^ *(?:async )?def (test_\w+)", file.read_text(), re.M)}

    assert set(re.findall(r"`(test_\w+)(?:\.py)?`", prose(page))) - known == set()


def test_the_table_of_the_recipe_has_its_fields_and_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) ?\| .+ \|$", section("reference.md", "Recipe"), flags=re.MULTILINE)
    expected = []
    for field, info in Recipe.model_fields.items():
        default = info.default if isinstance(info.default, str) else json.dumps(info.default, default=str)
        expected.append((field, "required" if info.is_required() else default))

    assert rows == expected


def test_the_placement_fields_are_those_that_may_change() -> None:
    assert set(re.findall(r"`(\w+)`", section("reference.md", "Placement fields"))) == PLACEMENT_FIELDS


@pytest.mark.parametrize("package", ["jobs", "pipeline"])
def test_the_rooms_stand_as_import_linter_holds_them(package: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (each["layers"] for each in contracts if each.get("containers") == [package])
    expected = {
        room: len(layers) - height
        for height, layer in enumerate(layers)
        for room in layer.split(" | ")
        if (ROOT / package / room).is_dir()
    }
    rows = re.findall(rf"^\| (\d+) \| `{package}/(\w+)` \|", section("architecture.md", "Rooms"), flags=re.MULTILINE)

    assert {room: int(height) for height, room in rows} == expected
