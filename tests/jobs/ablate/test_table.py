"""Tables of results that are made up, with values worked out by hand."""

from __future__ import annotations

from typing import Any

from jobs.ablate.ablation_page import ablation_html
from jobs.ablate.table import columns, csv_text, markdown, narrow_tables, rows, statement_lines


def run(seed: int, accuracy: float, random: float, whole: float) -> dict[str, Any]:
    return {
        "run": f"x-a-seed{seed}", "url": "/r", "seed": seed, "state": "finished", "step": 9, "final_loss": 0.5,
        "cost": {"unit": "GPU-hours", "productive": 1.0, "whole": whole}, "accuracies": {"linear probe": accuracy},
        "random": {"linear probe": random}, "epochs": [0.5, 1.0], "losses": [0.7, 0.5],
    }  # fmt: skip


RESULTS: dict[str, Any] = {
    "name": "x", "title": "Letters <b>", "seeds": [0, 1, 2], "evaluation": {"kind": "probe"},
    "variants": [
        {"name": "a", "base": "tiny", "changes": {}, "runs": [
            run(0, 36.0, 30.0, 1.5), run(1, 37.0, 31.0, 1.25), run(2, 35.0, 29.0, 1.25)]},
        {"name": "b", "base": "tiny", "changes": {}, "runs": [
            run(0, 40.0, 30.0, 1.0), {"run": "x-b-seed1", "url": "/r", "seed": 1, "state": "not started"}]},
    ],
    "paper": [{"variant": "a", "measure": "top-1", "value": 85.0, "source": "a paper"}],
    "statements": [
        {"text": "t", "source": "s", "measure": "linear probe", "verdict": "undecided", "figures": "36.0 → 40.0"}],
}  # fmt: skip


def test_the_table_has_means_deviations_random_weights_others_figures_and_hours() -> None:
    # Deviations: of 35, 36, 37 it is 1. Gains are 6 in each seed. Hours: 4 in all, of which 3 were productive.
    assert columns(RESULTS) == [
        "variant", "seeds", "loss", "linear probe", "random", "gain", "paper: top-1", "GPU-hours", "of them lost"
    ]  # fmt: skip
    assert rows(RESULTS) == [
        ["a", "3/3", "0.5000 ± 0.0000", "36.0 ± 1.0", "30.0 ± 1.0", "+6.0 ± 0.0", "85.0", "4.00", "1.00"],
        ["b", "1/2", "0.5000", "40.0", "30.0", "+10.0", "-", "1.00", "0.00"],
    ]


def test_markdown_csv_and_page_say_the_same() -> None:
    assert "| a | 3/3 | 0.5000 ± 0.0000 | 36.0 ± 1.0 | 30.0 ± 1.0 |" in markdown(RESULTS)
    assert "x-b-seed1,not started,0,,,,,," in csv_text(RESULTS)
    assert "a,1,x-a-seed1,finished,9,0.5,GPU-hours,1.0,1.25,37.0,31.0" in csv_text(RESULTS)
    html = ablation_html(RESULTS)
    assert "<td>36.0 ± 1.0</td>" in html
    assert "Letters &lt;b&gt;" in html
    assert html.count('<svg class="wide"') == 2  # figures of the probe, and losses


def test_a_terminal_gets_tables_of_few_columns_with_the_same_figures() -> None:
    probe, rest = narrow_tables(RESULTS)

    assert probe[0] == ["variant", "seeds", "linear probe", "random", "gain"]
    assert probe[1][0] == ["a", "3/3", "36.0 ± 1.0", "30.0 ± 1.0", "+6.0 ± 0.0"]
    assert rest[0] == ["variant", "seeds", "loss", "paper: top-1", "GPU-hours", "of them lost"]
    assert rest[1][1] == ["b", "1/2", "0.5000", "-", "1.00", "0.00"]
    assert list(statement_lines(RESULTS)) == ["undecided by linear probe: t (s); ours: 36.0 → 40.0"]
