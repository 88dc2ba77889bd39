"""Commonsense data in LLM-Adapters' format: a JSON list of {instruction, input, output, answer}."""

from pathlib import Path
from typing import Any

from comlora_trl.data.errors import DataError
from comlora_trl.data.files import (
    DATA_DIR_VARIABLE,
    check_row,
    download_llm_adapters,
    read_rows,
    unexpected,
)
from comlora_trl.data.keywords import COMMONSENSE_TASKS

TRAINING_FILE = "ft-training_set/commonsense_170k.json"
_TRAINING_FIELDS = {"instruction": str, "output": str}
_TEST_FIELDS = {"instruction": str, "answer": str}


def instruction_of(row: dict[str, Any]) -> str:
    """The instruction, with the row's input below it if there is one (the commonsense data has none)."""
    extra = row.get("input") or ""
    return f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]


def to_pair(row: dict[str, Any]) -> tuple[str, str]:
    """(instruction, completion) of a row."""
    return instruction_of(row), row["output"]


def check_training_row(row: dict[str, Any], number: int, source: str) -> None:
    """Raises a DataError when a row has no instruction and output, or something other than text in them."""
    _check(row, number, _TRAINING_FIELDS, source)


def _check(row: dict[str, Any], number: int, fields: dict[str, type], source: str) -> None:
    extra = {} if row.get("input") is None else {"input": str}
    check_row(row, number, fields | extra, source)


def read_training_rows(path: Path) -> list[dict[str, Any]]:
    """Rows to train on, fields checked."""
    rows = read_rows(path)
    for number, row in enumerate(rows):
        check_training_row(row, number, str(path))
    return rows


def read_test_rows(path: Path, task: str) -> list[dict[str, Any]]:
    """Rows of a test file, whose answers must be keywords of the task.

    Raises:
        DataError: see [`read_rows`]; or an answer that could never be given.
    """
    rows = read_rows(path)
    keywords = COMMONSENSE_TASKS[task].keywords
    for number, row in enumerate(rows):
        _check(row, number, _TEST_FIELDS, str(path))
        if row["answer"] not in keywords:
            expected = f"one of {', '.join(keywords)}, the answers of {task}"
            raise DataError(unexpected(str(path), number, "answer", row["answer"], expected))
    return rows


def test_file(task: str, data_dir: str | Path | None) -> Path:
    """The test file of a task: `commonsense/TASK/test.json` of the data folder, else the pinned public one.

    Raises:
        DataError: a data folder is named and does not hold the file, or the download fails.
    """
    if data_dir is None:
        return download_llm_adapters(f"dataset/{task}/test.json")
    path = Path(data_dir).expanduser() / "commonsense" / task / "test.json"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file, but {data_dir} was named as the data folder; put LLM-Adapters' "
            f"dataset/{task}/test.json there, leave {task} out of --tasks, or unset the folder to download it"
        )
    return path


def training_file(task: str, split: str, data_dir: str | None) -> Path:
    """The training file of a preset: `commonsense_170k`, or one of the eight tasks.

    Raises:
        DataError: there is no file of that split with a known checksum, and no data folder holds one.
    """
    if task == "commonsense_170k":
        local = Path(data_dir).expanduser() / "commonsense_170k.json" if data_dir else None
        if split != "train":
            raise DataError(f"commonsense_170k has only the split 'train', got {split!r}")
        return local if local and local.is_file() else download_llm_adapters(TRAINING_FILE)
    if split == "test":
        return test_file(task, data_dir)
    path = Path(data_dir).expanduser() / "commonsense" / task / f"{split}.json" if data_dir else None
    if path and path.is_file():
        return path
    raise DataError(
        f"{path or task}: no {split} file of {task} alone; set {DATA_DIR_VARIABLE} to a folder that holds "
        f"commonsense/{task}/{split}.json, name a file, or use commonsense_170k, which contains the eight"
    )
