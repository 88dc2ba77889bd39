"""MMLU in the hub's schema: {question, subject, choices, answer}, the answer an index into the four choices."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from comlora_trl.data.errors import DataError, reason_of
from comlora_trl.data.files import DATA_DIR_VARIABLE, check_row, read_rows, unexpected

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HUB_ID = "cais/mmlu"
HUB_REVISION = "c30699e8356da336a370243923dbaf21066bb9fe"
_TEST_ROWS = (
    "abstract_algebra:100 anatomy:135 astronomy:152 business_ethics:100 clinical_knowledge:265 college_biology:144 "
    "college_chemistry:100 college_computer_science:100 college_mathematics:100 college_medicine:173 "
    "college_physics:102 computer_security:100 conceptual_physics:235 econometrics:114 electrical_engineering:145 "
    "elementary_mathematics:378 formal_logic:126 global_facts:100 high_school_biology:310 high_school_chemistry:203 "
    "high_school_computer_science:100 high_school_european_history:165 high_school_geography:198 "
    "high_school_government_and_politics:193 high_school_macroeconomics:390 high_school_mathematics:270 "
    "high_school_microeconomics:238 high_school_physics:151 high_school_psychology:545 high_school_statistics:216 "
    "high_school_us_history:204 high_school_world_history:237 human_aging:223 human_sexuality:131 "
    "international_law:121 jurisprudence:108 logical_fallacies:163 machine_learning:112 management:103 marketing:234 "
    "medical_genetics:100 miscellaneous:783 moral_disputes:346 moral_scenarios:895 nutrition:306 philosophy:311 "
    "prehistory:324 professional_accounting:282 professional_law:1534 professional_medicine:272 "
    "professional_psychology:612 public_relations:110 security_studies:245 sociology:201 us_foreign_policy:100 "
    "virology:166 world_religions:171 "
)
# Test questions by subject
SUBJECT_ROWS = {name: int(rows) for name, rows in (entry.split(":") for entry in _TEST_ROWS.split())}
TEST_ROWS = sum(SUBJECT_ROWS.values())
LETTERS = ("A", "B", "C", "D")
_FIELDS = {"question": str, "choices": list, "answer": int}


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
    for number, row in enumerate(rows):
        check_mmlu_row(row, number, str(path))
    return rows


def check_mmlu_row(row: dict[str, Any], number: int, source: str) -> None:
    """Raises a DataError when a row has no question, no four choices, or an answer that is not an index of them."""
    check_row(row, number, _FIELDS, source)
    choices, answer = row["choices"], row["answer"]
    if len(choices) != len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(unexpected(source, number, "choices", choices, "a list of four texts"))
    if not 0 <= answer < len(LETTERS):
        raise DataError(unexpected(source, number, "answer", answer, "an index 0 to 3"))


def local_file(folder: Path, split: str) -> Path | None:
    """The file of a split in a folder laid out `{dev,test}.jsonl`, or None when it has no such file.

    The five questions per subject in `dev` never replace another split; they are used only if `dev` is named.
    """
    names = {"train": ("train", "auxiliary_train"), "validation": ("validation", "val")}
    for name in names.get(split, (split,)):
        for suffix in (".jsonl", ".json"):
            if (path := folder / (name + suffix)).is_file():
                return path
    return None


def missing_file(folder: Path, split: str) -> DataError:
    """The error when a data folder lacks a split: names what the folder has instead."""
    found = sorted({path.stem for path in folder.glob("*.json*")} - {"test"})
    advice = f", or name the split {' or '.join(found)}, which is there" if found and split != "test" else ""
    return DataError(
        f"{folder / split}.jsonl: no such file, but {folder.parent} was named as the data folder; put {HUB_ID}'s "
        f"{split} questions there (per line: question, subject, choices, answer), unset the folder to download "
        f"them{advice}"
    )


def load_from_hub(split: str, streaming: bool = False) -> "Dataset | IterableDataset":
    """A split of the pinned data set on the hub; "train" is its auxiliary training questions.

    Raises:
        DataError: it cannot be loaded; says what to do without a network.
    """
    from datasets import load_dataset

    # The configuration "auxiliary_train" has the same questions, but nested in one column
    hub_split = "auxiliary_train" if split == "train" else split
    try:
        return load_dataset(HUB_ID, "all", split=hub_split, streaming=streaming, revision=HUB_REVISION)
    except Exception as error:  # the hub's errors share no class
        raise DataError(
            f"{HUB_ID} at {HUB_REVISION[:7]}: the {split} questions cannot be loaded from the hub "
            f"({reason_of(error)}); offline, set {DATA_DIR_VARIABLE} to a folder that holds "
            f"mmlu/{split}.jsonl"
        ) from error
