"""Functions that the task files in lm_eval_tasks/ name: their data, their scoring, their aggregation.

lm_eval calls a loader with the task's metadata (the file's own, `--model_args` and `--metadata` merged) and its
`dataset_kwargs`. A loader gives documents {instruction, output, answer, ...}, the source's rows; the task's class
([`comlora_trl.evaluation.harness`]) makes the prompt.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comlora_trl.data import commonsense, convai2, mmlu
from comlora_trl.data.demo import read_demo_rows
from comlora_trl.data.errors import DataError
from comlora_trl.data.files import DATA_DIR_VARIABLE, check_row, file_state
from comlora_trl.data.keywords import COMMONSENSE_TASKS, first_keyword, first_letter
from comlora_trl.evaluation.stopping import RESPONSE_MARK

if TYPE_CHECKING:
    from datasets import DatasetDict

METADATA_KEYS = ("comlora_data_dir", "comlora_prompt")
Doc = dict[str, Any]


def load_commonsense(comlora_source: str, comlora_data_dir: str | None = None, **metadata: Any) -> "DatasetDict":
    """The test set of one of the eight tasks.

    Args:
        comlora_source: the task's name in LLM-Adapters' repository.
        comlora_data_dir: the data folder; without it COMLORA_DATA_DIR; without that the pinned public file.
        metadata: the rest, unused.

    Raises:
        DataError: the data is missing or not as expected.
    """
    rows = _commonsense_rows(comlora_source, _data_dir(comlora_data_dir))
    return _dataset([_keyword_doc(row, comlora_source) for row in rows], metadata)


def load_demo(**metadata: Any) -> "DatasetDict":
    """The bundled test set, the eight tasks in turns, so that `--limit` takes some of each."""
    by_task: dict[str, list[Doc]] = {}
    for row in read_demo_rows("test"):
        by_task.setdefault(row["task"], []).append(_keyword_doc(row, row["task"]))
    turns = chain.from_iterable(zip_longest(*by_task.values()))
    return _dataset([doc for doc in turns if doc is not None], metadata)


def load_mmlu(comlora_source: str, comlora_data_dir: str | None = None, **metadata: Any) -> "DatasetDict":
    """The test questions of one MMLU subject; see [`load_commonsense`] for the arguments."""
    source, subjects = _mmlu_rows(_data_dir(comlora_data_dir))
    if comlora_source not in subjects:
        raise DataError(
            f"{source}: no question on {comlora_source}, expected all 57 subjects; complete the file, or name the "
            f"subjects it has in --tasks: {', '.join(f'comlora_mmlu_{subject}' for subject in subjects)}"
        )
    docs = []
    for row in subjects[comlora_source]:
        instruction, output = mmlu.to_pair(row)
        docs.append({"instruction": instruction, "output": output, "answer": mmlu.answer_letter(row)})
    return _dataset(docs, metadata)


def load_convai2(comlora_data_dir: str | None = None, **metadata: Any) -> "DatasetDict":
    """The replies of CONVAI2's validation file (it has no public test set); see [`load_commonsense`]."""
    path = convai2.local_file("validation", _data_dir(comlora_data_dir), DATA_DIR_VARIABLE)
    rows = _convai2_rows(file_state(path))
    groups = convai2.number_groups([row["instruction"] for row in rows])
    docs = [
        row | {"index": index, "group": group} for index, (row, group) in enumerate(zip(rows, groups, strict=True))
    ]
    return _dataset(docs, metadata)


def score_keyword(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """1 when the first keyword of the response is the answer. A repeated prompt ends the response, as LLM-Adapters'
    script has it."""
    response = results[0].split(RESPONSE_MARK)[0].strip()
    return {"acc": float(first_keyword(response, COMMONSENSE_TASKS[doc["task"]].keywords) == doc["answer"])}


def score_keyword_as_hira(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """As HiRA's scripts: the response is cut at "Q:" and "R:", and the answer read from the row's output likewise, so
    that nothing equals nothing."""
    keywords = COMMONSENSE_TASKS[doc["task"]].keywords
    response = results[0].split("Q:")[0].split("R:")[0]
    return {"acc": float(first_keyword(response, keywords) == first_keyword(doc["output"], keywords))}


def score_letter(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """1 when the first letter A to D that stands alone in the response, and is no article, is the answer."""
    response = results[0].split(RESPONSE_MARK)[0].strip()
    return {"acc": float(first_letter(response, mmlu.LETTERS) == doc["answer"])}


DIALOGUE_METRICS = (
    "bleu",
    "meteor",
    "rouge_l",
    "bertscore_precision",
    "bertscore_recall",
    "bertscore_f1",
    "average",
    "bertscore_model",
)
DialogueItem = tuple[int, int, str, str]


def collect_dialogue(doc: Doc, results: Sequence[str]) -> dict[str, DialogueItem]:
    """One document for the corpus metrics: (index, group, reply, reference)."""
    return _dialogue_item(doc, convai2.cut_reply(results[0]))


def collect_dialogue_as_hira(doc: Doc, results: Sequence[str]) -> dict[str, DialogueItem]:
    """As [`collect_dialogue`], the reply cut as HiRA's script does."""
    return _dialogue_item(doc, convai2.cut_reply_as_hira(results[0]))


def _dialogue_item(doc: Doc, reply: str) -> dict[str, DialogueItem]:
    return dict.fromkeys(DIALOGUE_METRICS, (doc["index"], doc["group"], reply, doc["output"]))


def aggregate_bleu(items: Sequence[DialogueItem]) -> float:
    """Corpus BLEU, 0 to 100."""
    return _scores(items)["bleu"]


def aggregate_meteor(items: Sequence[DialogueItem]) -> float:
    """Mean METEOR, 0 to 100."""
    return _scores(items)["meteor"]


def aggregate_rouge_l(items: Sequence[DialogueItem]) -> float:
    """Mean ROUGE-L F1, 0 to 100."""
    return _scores(items)["rouge_l"]


def aggregate_bertscore_precision(items: Sequence[DialogueItem]) -> float:
    """Mean BERTScore precision, times 100."""
    return _scores(items)["bertscore_precision"]


def aggregate_bertscore_recall(items: Sequence[DialogueItem]) -> float:
    """Mean BERTScore recall, times 100."""
    return _scores(items)["bertscore_recall"]


def aggregate_bertscore_f1(items: Sequence[DialogueItem]) -> float:
    """Mean BERTScore F1, times 100."""
    return _scores(items)["bertscore_f1"]


def aggregate_average(items: Sequence[DialogueItem]) -> float:
    """The mean of the six, the paper's Average."""
    return _scores(items)["average"]


def name_bertscore_model(items: Sequence[DialogueItem]) -> str:
    """The model BERTScore was computed with; scores of different models cannot be compared."""
    from comlora_trl.evaluation.metrics import bertscore_model_name

    return bertscore_model_name()


def _scores(items: Sequence[DialogueItem]) -> dict[str, float]:
    """All scores at once, for lm_eval asks for them metric by metric. Several processes hand in their documents one
    process after the other, hence the sorting."""
    from comlora_trl.evaluation.metrics import bertscore_identity

    return _dialogue_scores(tuple(sorted(items)), bertscore_identity())


@lru_cache(maxsize=1)
def _dialogue_scores(items: tuple[DialogueItem, ...], bertscore: Any) -> dict[str, float]:
    from comlora_trl.evaluation.metrics import score_dialogue

    _, groups, replies, references = (list(column) for column in zip(*items, strict=True))
    return score_dialogue(*convai2.group_references(groups, replies, references))


def _data_dir(named: str | None) -> str | None:
    return named or os.environ.get(DATA_DIR_VARIABLE) or None


def _keyword_doc(row: Doc, task: str) -> Doc:
    output = row.get("output") or ""
    return {"instruction": commonsense.instruction_of(row), "output": output, "answer": row["answer"], "task": task}


def _dataset(docs: list[Doc], metadata: dict[str, Any]) -> "DatasetDict":
    """Documents as lm_eval takes them. A misspelt metadata key is refused; the default would hide it."""
    from datasets import Dataset, DatasetDict

    unknown = [key for key in metadata if key.startswith("comlora_") and key not in METADATA_KEYS]
    if unknown:
        raise DataError(f"--metadata has the unknown key {unknown[0]!r}: choose from {', '.join(METADATA_KEYS)}")
    return DatasetDict(test=Dataset.from_list(docs))


# Tasks are loaded twice, once to check the data before the model is loaded: the rows are cached by the file's state


def _commonsense_rows(task: str, data_dir: str | None) -> list[Doc]:
    path = commonsense.test_file(task, data_dir)
    rows = _commonsense_file(task, file_state(path))
    if data_dir is None and len(rows) != COMMONSENSE_TASKS[task].test_rows:
        raise DataError(f"{path}: {len(rows)} rows, expected {COMMONSENSE_TASKS[task].test_rows}; delete the file")
    return rows


@lru_cache(maxsize=len(COMMONSENSE_TASKS))
def _commonsense_file(task: str, state: tuple[str, int, int]) -> list[Doc]:
    return commonsense.read_test_rows(Path(state[0]), task)


def _mmlu_rows(data_dir: str | None) -> tuple[str, dict[str, list[Doc]]]:
    """(name of the source, rows by subject)."""
    if data_dir is None:
        return _hub_mmlu()
    folder = Path(data_dir).expanduser() / "mmlu"
    path = mmlu.local_file(folder, "test")
    if path is None:
        raise mmlu.missing_file(folder, "test")
    return _local_mmlu(str(path), file_state(path))


@lru_cache(maxsize=1)
def _local_mmlu(source: str, state: tuple[str, int, int]) -> tuple[str, dict[str, list[Doc]]]:
    return source, _by_subject(mmlu.read_mmlu_rows(Path(state[0])), source)


@lru_cache(maxsize=1)
def _hub_mmlu() -> tuple[str, dict[str, list[Doc]]]:
    source = f"{mmlu.HUB_ID} at {mmlu.HUB_REVISION[:7]}"
    rows = mmlu.load_from_hub("test").to_list()
    for number, row in enumerate(rows):
        mmlu.check_mmlu_row(row, number, source)
    if len(rows) != mmlu.TEST_ROWS:
        raise DataError(f"{source}: {len(rows)} test questions, expected {mmlu.TEST_ROWS}; clear the datasets cache")
    return source, _by_subject(rows, source)


def _by_subject(rows: list[Doc], source: str) -> dict[str, list[Doc]]:
    subjects: dict[str, list[Doc]] = {}
    for number, row in enumerate(rows):
        check_row(row, number, {"subject": str}, source)
        subjects.setdefault(row["subject"], []).append(row)
    return subjects


@lru_cache(maxsize=1)
def _convai2_rows(state: tuple[str, int, int]) -> list[Doc]:
    return convai2.read_convai2_rows(Path(state[0]))
