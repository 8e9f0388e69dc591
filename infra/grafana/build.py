"""Writes the dashboards' JSON: `python -m infra.grafana.build`, after a change of boards.py or panels.py."""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from infra.grafana.boards import BOARDS
from infra.grafana.panels import Board, built

FOLDER = Path(__file__).parent / "dashboards"


def board_json(board: Board) -> str:
    """The file that Grafana loads."""
    return str(JSONEncoder(sort_keys=True, indent=2).encode(built(board))) + "\n"


def main() -> None:
    """Write every board into its file."""
    for board in BOARDS:
        (FOLDER / f"{board.uid}.json").write_text(board_json(board))


if __name__ == "__main__":
    main()
