"""The data set that comes with the package, in LLM-Adapters' format with the name of each row's task."""

from typing import Any

from comlora_trl.data.errors import DataError
from comlora_trl.data.files import read_rows
from comlora_trl.demo import DEMO_SPLITS, demo_data_path


def read_demo_rows(split: str) -> list[dict[str, Any]]:
    """Rows {instruction, input, output, answer, task} of a split.

    Raises:
        DataError: there is no such split.
    """
    if split not in DEMO_SPLITS:
        raise DataError(f"demo has no split {split!r}: choose one of {', '.join(DEMO_SPLITS)}")
    return read_rows(demo_data_path(split), dict.fromkeys(("instruction", "output", "answer", "task"), str))
