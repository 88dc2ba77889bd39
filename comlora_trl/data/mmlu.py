"""MMLU in the hub's schema: {question, subject, choices, answer}, the answer an index into the four choices."""

from pathlib import Path
from typing import Any

from comlora_trl.data.errors import DataError
from comlora_trl.data.files import check_fields, read_rows

HUB_ID = "cais/mmlu"
HUB_REVISION = "c30699e8356da336a370243923dbaf21066bb9fe"
TEST_ROWS = 14042
LETTERS = ("A", "B", "C", "D")
FIELDS = ("question", "choices", "answer")


def to_instruction(row: dict[str, Any]) -> str:
    """Question and choices in the manner of the commonsense data, answered by a letter."""
    choices = "\n".join(f"{letter}: {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return (
        f"Please choose the correct answer to the question: {row['question']}\n\n{choices}\n\n"
        f"Answer format: {'/'.join(LETTERS)}"
    )


def answer_letter(row: dict[str, Any]) -> str:
    """The letter of a row's correct choice."""
    return LETTERS[row["answer"]]


def to_pair(row: dict[str, Any]) -> tuple[str, str]:
    """(instruction, completion) of a row."""
    return to_instruction(row), f"the correct answer is {answer_letter(row)}"


def read_mmlu_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a local file (.jsonl or .json), checked."""
    rows = read_rows(path)
    check_mmlu_rows(rows, str(path))
    return rows


def check_mmlu_rows(rows: list[dict[str, Any]], source: str) -> None:
    """Raises a DataError at the first row without four choices or with an answer that is not an index of them."""
    check_fields(rows, FIELDS, source)
    for number, row in enumerate(rows):
        if not isinstance(row["choices"], list | tuple) or len(row["choices"]) != len(LETTERS):
            raise DataError(f"{source}: row {number} has the choices {row['choices']!r}, expected a list of four")
        if not isinstance(row["answer"], int) or not 0 <= row["answer"] < len(LETTERS):
            raise DataError(f"{source}: row {number} has the answer {row['answer']!r}, expected an index 0 to 3")


def local_file(folder: Path, split: str) -> Path | None:
    """The file of a split in a folder laid out `{dev,test}.jsonl`, or None when it has no such file.

    A local MMLU seldom has training questions; then its five-per-subject `dev` stands in for "train".
    """
    names = {"train": ("train", "auxiliary_train", "dev"), "validation": ("validation", "val", "dev")}
    for name in names.get(split, (split,)):
        for suffix in (".jsonl", ".json"):
            if (path := folder / (name + suffix)).is_file():
                return path
    return None


def hub_split(split: str) -> tuple[str, str]:
    """The hub's (configuration, split) that a split stands for."""
    return ("auxiliary_train", "train") if split == "train" else ("all", split)
