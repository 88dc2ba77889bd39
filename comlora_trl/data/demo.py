"""The data set that comes with the package, in LLM-Adapters' format with the name of each row's task."""

from pathlib import Path
from typing import Any

from comlora_trl.data.errors import DataError
from comlora_trl.data.files import read_rows

SPLITS = ("train", "validation", "test")
FOLDER = Path(__file__).resolve().parent.parent / "demo" / "data"


def read_demo_rows(split: str) -> list[dict[str, Any]]:
    """Rows {instruction, input, output, answer, task} of a split.

    Raises:
        DataError: there is no such split.
    """
    if split not in SPLITS:
        raise DataError(f"demo has no split {split!r}: choose one of {', '.join(SPLITS)}")
    return read_rows(FOLDER / f"{split}.json", ("instruction", "output", "answer", "task"))
