"""The texts that a base learns: CONVAI2's replies, and WordNet's definitions. One place that says how they are read.

A row is {"instruction", "output"}; the prompt is built of the instruction. Each task has rows to train on ("train")
and others that nobody trains on ("validation").
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from comlora_trl.data.convai2 import file_name, read_convai2_rows

Row = dict[str, str]
DEFAULT = "convai2"
# As many as the copy of CONVAI2 has that the study began with, so that a pass has the same steps
TRAINING_ROWS, HELD_OUT_ROWS = 4690, 780
_KINDS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


@dataclass(frozen=True)
class Task:
    """A data set.

    Attributes:
        files: names of what it is read from.
        folders: where they lie in the folder that the user gives; the first that has them all counts.
        read: (folder of the files, "train" or "validation") to rows, always the same ones in the same order.
        what: what the folder is called in messages.
    """

    files: tuple[str, ...]
    folders: tuple[str, ...]
    read: Callable[[Path, str], list[Row]]
    what: str


def files(task: str, folder: Path) -> list[Path]:
    """What a task is read from.

    Raises:
        FileNotFoundError: the folder has not all of it.
    """
    of = TASKS[task]
    for place in of.folders:
        if all((folder / place / name).is_file() for name in of.files):
            return [folder / place / name for name in of.files]
    lost = next(name for name in of.files if not (folder / name).is_file())
    raise FileNotFoundError(f"{folder} has no file {lost}: give {of.what}")


def read_rows(task: str, folder: Path, split: str) -> list[Row]:
    """The rows of a task's split, "train" or "validation".

    Raises:
        FileNotFoundError: the folder has not the task's files.
        DataError: ParlAI's text is not as expected.
        ValueError: WordNet's is not, or it is too small.
    """
    return TASKS[task].read(files(task, folder)[0].parent, split)


def parse_wordnet(text: str, source: str) -> Iterator[tuple[str, str, str]]:
    """(part of speech, word, definition) of every synset in the text of a data file: the first lemma, no examples.

    A gloss is a definition, and examples in quotation marks after semicolons. The few definitions that have a
    quotation mark themselves are left out, for there an example cannot be told from them.

    Args:
        text: the file's text.
        source: its name, for the error.

    Raises:
        ValueError: a line is not a synset's.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        # The licence is indented
        if not line.strip() or line.startswith(" "):
            continue
        head, bar, gloss = line.partition("|")
        fields = head.split()
        if not bar or len(fields) < 5 or fields[2] not in _KINDS:
            raise ValueError(f"{source}: line {number} is no synset of WordNet's data files")
        # An adjective's lemma can end with where it stands: (a), (p) or (ip)
        word = re.sub(r"\((?:a|p|ip)\)$", "", fields[4]).replace("_", " ")
        definition = re.split(r';\s*"', gloss, maxsplit=1)[0].strip("; \r")
        if definition and '"' not in definition:
            yield _KINDS[fields[2]], word, definition


def read_wordnet_rows(folder: Path, split: str) -> list[Row]:
    """Rows of a folder with WordNet's data files: each asks for the definition of a word.

    Each definition counts once. The order is that of the rows' hashes, the same everywhere. The first 780 rows are
    held out (of a small folder a seventh), the next 4,690 whose words are in none of these are trained on.

    Args:
        folder: with `data.noun`, `data.verb`, `data.adj` and `data.adv`.
        split: "train" or "validation".

    Raises:
        ValueError: a file is not WordNet's, or there are fewer than seven definitions.
    """
    synsets: dict[str, tuple[str, str, str]] = {}
    for name in TASKS["wordnet"].files:
        for kind, word, definition in parse_wordnet((folder / name).read_text(encoding="utf-8"), name):
            synsets.setdefault(definition, (kind, word, definition))
    order = sorted(synsets.values(), key=lambda synset: hashlib.sha256("\t".join(synset).encode()).digest())
    held_out = order[: min(HELD_OUT_ROWS, len(order) // 7)]
    if not held_out:
        raise ValueError(f"{folder} has {len(order)} definitions: seven at least are needed")
    known = {word.casefold() for _, word, _ in held_out}
    training = [synset for synset in order if synset[1].casefold() not in known][:TRAINING_ROWS]
    return [
        {"instruction": f'Give the definition of the {kind} "{word}".', "output": definition}
        for kind, word, definition in (training if split == "train" else held_out)
    ]


def _read_convai2(folder: Path, split: str) -> list[Row]:
    return read_convai2_rows(folder / file_name(split))


TASKS = {
    DEFAULT: Task((file_name("train"), file_name("validation")), ("",), _read_convai2, "ParlAI's ConvAI2 folder"),
    "wordnet": Task(
        ("data.noun", "data.verb", "data.adj", "data.adv"),
        ("", "corpora/wordnet"),
        read_wordnet_rows,
        "WordNet 3.0's data files, or the NLTK data folder with corpora/wordnet",
    ),
}
