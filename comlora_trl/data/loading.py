"""Loads a preset, a file, a folder or a hub id as a data set for TRL's SFTTrainer."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from comlora_trl.data import commonsense, convai2, mmlu
from comlora_trl.data.demo import read_demo_rows
from comlora_trl.data.errors import DataError, reason_of
from comlora_trl.data.files import DATA_DIR_VARIABLE, read_rows
from comlora_trl.data.keywords import COMMONSENSE_TASKS
from comlora_trl.data.prompts import build_prompt

PRESETS = ("commonsense_170k", "mmlu", "convai2", "demo", *COMMONSENSE_TASKS)
TRL_COLUMNS = ("messages", "conversations", "prompt", "input_ids")

Pair = tuple[str, str]
# The functions that check a row, and that turn it into (instruction, completion)
Schema = tuple[Callable[[dict[str, Any], int, str], None], Callable[[dict[str, Any]], Pair]]


def load_training_dataset(
    name: str | os.PathLike | Sequence[str | os.PathLike],
    split: str = "train",
    template: str = "comlora",
    config: str | None = None,
    streaming: bool = False,
    text_field: str = "text",
) -> Dataset | IterableDataset:
    """Loads data to train on, as prompt-completion rows.

    Args:
        name: a preset (see `PRESETS`), a local file (.json, .jsonl, ParlAI's .txt), a folder of such, a list of files,
            or a hub id. Instruction data (instruction, output) and multiple choice (question, choices, answer) become
            {prompt, completion}; TRL's own formats are left alone.
        split: the split; in a folder, the name of the files. A file is one set of rows, whose only split is "train".
        template: the prompt template, see [`build_prompt`].
        config: configuration of a hub data set.
        streaming: give an `IterableDataset`.
        text_field: the column of plain text, TRL's `dataset_text_field`.

    Raises:
        DataError: the data is missing, empty or lacks a field; the message says what to do.
    """
    build_prompt("", template)  # an unknown template fails before anything is read or downloaded
    if not isinstance(name, str | os.PathLike):
        _refuse_split(", ".join(map(str, name)), split)
        pairs = [pair for path in name for pair in _file_pairs(Path(path))]
        return _to_dataset(pairs, template, streaming)
    if str(name) == "mmlu":
        return _load_mmlu(split, template, streaming)
    if str(name) in PRESETS:
        return _to_dataset(_preset_pairs(str(name), split), template, streaming)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, split, template, config, streaming, text_field)
    if path.is_file():
        _refuse_split(str(path), split)
        return _load_file(path, template, streaming, text_field)
    return _load_hub(str(name), split, template, config, streaming, text_field)


def _refuse_split(name: str, split: str) -> None:
    if split != "train":
        raise DataError(
            f"{name}: a file has no split {split!r}, all its rows are 'train'; leave the split out, or name the file "
            "or the folder that holds that split"
        )


def _to_dataset(pairs: list[Pair], template: str, streaming: bool) -> Dataset | IterableDataset:
    columns = {
        "prompt": [build_prompt(instruction, template) for instruction, _ in pairs],
        "completion": [completion for _, completion in pairs],
    }
    dataset = Dataset.from_dict(columns)
    return dataset.to_iterable_dataset() if streaming else dataset


def _preset_pairs(name: str, split: str) -> list[Pair]:
    data_dir = os.environ.get(DATA_DIR_VARIABLE)
    if name == "demo":
        return [commonsense.to_pair(row) for row in read_demo_rows(split)]
    if name == "convai2":
        path = convai2.local_file(split, data_dir, DATA_DIR_VARIABLE)
    else:
        path = commonsense.training_file(name, split, data_dir)
    return _file_pairs(path)


def _load_mmlu(split: str, template: str, streaming: bool) -> Dataset | IterableDataset:
    data_dir = os.environ.get(DATA_DIR_VARIABLE)
    if not data_dir:
        return _to_pairs(mmlu.load_from_hub(split, streaming), mmlu.HUB_ID, template)
    folder = Path(data_dir).expanduser() / "mmlu"
    path = mmlu.local_file(folder, split)
    if path is None:
        raise mmlu.missing_file(folder, split)
    return _load_file(path, template, streaming)


def _file_pairs(path: Path) -> list[Pair]:
    """(instruction, completion) of every row of a file of ours."""
    if path.suffix == ".txt":
        return [commonsense.to_pair(row) for row in convai2.read_convai2_rows(path)]
    rows = read_rows(path)
    if _is_mmlu(rows[0]):
        return [mmlu.to_pair(row) for row in mmlu.read_mmlu_rows(path)]
    return [commonsense.to_pair(row) for row in commonsense.read_training_rows(path)]


def _is_mmlu(columns: Any) -> bool:
    return {"question", "choices"} <= set(columns)


def _is_trl(columns: Any, text_field: str) -> bool:
    return any(column in columns for column in (text_field, *TRL_COLUMNS)) and "instruction" not in columns


def _load_file(path: Path, template: str, streaming: bool, text_field: str = "text") -> Dataset | IterableDataset:
    if path.suffix not in (".json", ".jsonl", ".txt"):
        raise DataError(f"{path}: unknown kind of file; expected .json, .jsonl or ParlAI's .txt")
    if path.suffix != ".txt":
        columns = read_rows(path)[0]
        if _is_trl(columns, text_field):
            return load_dataset("json", data_files=str(path), split="train", streaming=streaming)
        if not _is_mmlu(columns) and not {"instruction", "output"} & set(columns):
            raise _unknown_columns(path, columns, text_field)
    return _to_dataset(_file_pairs(path), template, streaming)


def _load_folder(
    folder: Path, split: str, template: str, config: str | None, streaming: bool, text_field: str
) -> Dataset | IterableDataset:
    """A folder with one of our layouts; any other is left to `datasets`."""
    if files := _folder_files(folder, split):
        if len(files) == 1:
            return _load_file(files[0], template, streaming, text_field)
        return _to_dataset([pair for file in files for pair in _file_pairs(file)], template, streaming)
    if _has_other_data(folder):
        return _load_hub(str(folder), split, template, config, streaming, text_field)
    others = sorted(path.name for suffix in (".json", ".jsonl", ".txt") for path in folder.glob(f"*{suffix}"))
    raise DataError(
        f"{folder}: no data of the split {split!r}; expected TASK/{split}.json, TASK.json, {split}.json or .jsonl, "
        f"or ParlAI's train_self_original.txt; got {', '.join(others) or 'none of them'}; to use one of those, name "
        "the file, or its split (--dataset_train_split)"
    )


def _folder_files(folder: Path, split: str) -> list[Path]:
    if split in convai2.FILES and (path := folder / convai2.FILES[split]).is_file():
        return [path]
    if files := sorted(folder.glob(f"*/{split}.json")):
        return files
    if path := mmlu.local_file(folder, split):
        return [path]
    if split != "train":
        return []
    return sorted(path for task in COMMONSENSE_TASKS if (path := folder / f"{task}.json").is_file())


def _has_other_data(folder: Path) -> bool:
    return any(path.suffix in (".parquet", ".csv", ".arrow") for path in folder.rglob("*"))


def _load_hub(
    name: str, split: str, template: str, config: str | None, streaming: bool, text_field: str
) -> Dataset | IterableDataset:
    try:
        dataset = load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # the hub's errors share no class
        raise DataError(
            f"{name}: not a preset ({', '.join(PRESETS)}), not a local file or folder, and not loaded from the hub "
            f"({reason_of(error)}); check the name, and the network if it is on the hub"
        ) from error
    return _to_pairs(dataset, name, template, text_field)


def _to_pairs(
    dataset: Dataset | IterableDataset, name: str, template: str, text_field: str = "text"
) -> Dataset | IterableDataset:
    """Prompt-completion rows of a loaded data set, unless it is in one of TRL's formats."""
    columns = dataset.column_names or list(next(iter(dataset)))
    if _is_trl(columns, text_field):
        return dataset
    if _is_mmlu(columns):
        schema: Schema = (mmlu.check_mmlu_row, mmlu.to_pair)
    elif {"instruction", "output"} <= set(columns):
        schema = (commonsense.check_training_row, commonsense.to_pair)
    else:
        raise _unknown_columns(name, columns, text_field)
    to_row = partial(_map_row, schema=schema, name=name, template=template)
    return dataset.map(to_row, with_indices=True, remove_columns=columns)


def _unknown_columns(name: Any, columns: Any, text_field: str) -> DataError:
    trls = ", ".join((text_field, *TRL_COLUMNS))
    return DataError(
        f"{name}: has the columns {', '.join(columns)}; expected instruction and output, or question, choices "
        f"and answer, or one of TRL's ({trls}); rename the columns, or name the text's with --dataset_text_field"
    )


def _map_row(row: dict[str, Any], number: int, schema: Schema, name: str, template: str) -> dict[str, str]:
    check, to_pair = schema
    check(row, number, name)
    instruction, completion = to_pair(row)
    return {"prompt": build_prompt(instruction, template), "completion": completion}
