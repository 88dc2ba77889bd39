"""CONVAI2 in ParlAI's text format, self persona: persona lines, then `turn<TAB>reply<TAB><TAB>candidates`.

Lines are numbered, and the number 1 begins a new dialogue. The model sees the persona and the dialogue so far and
writes the next reply. The speakers are marked Q and R.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comlora_trl.data.errors import DataError
from comlora_trl.data.files import read_text

SPEAKER_MARKS = ("Q:", "R:")
# There is no public test set: papers report the validation file
FILES = {
    "train": "train_self_original.txt",
    "validation": "valid_self_original.txt",
    "test": "valid_self_original.txt",
}
# Replies in ParlAI's validation file, self persona
VALIDATION_ROWS = 7801
_PERSONA = "your persona:"
_TASK = "Continue the dialogue: write what R says next, in keeping with R's persona."

WHERE_FROM = (
    "CONVAI2 has no stable public file: install ParlAI (https://github.com/facebookresearch/ParlAI), run "
    "`parlai display_data -t convai2:SelfOriginal`, and copy {name} from its data/ConvAI2 folder"
)


@dataclass
class _Dialogue:
    """A dialogue up to the present turn."""

    persona: list[str] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)


def parse_dialogues(text: str, source: str) -> Iterator[dict[str, Any]]:
    """One row {instruction, output} per reply.

    Args:
        text: the file's text.
        source: its name, for error messages.

    Raises:
        DataError: a line without a number, a turn without a reply, or a turn of a dialogue that has no persona.
    """
    dialogue = _Dialogue()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        match = re.match(r"(\d+) (.*)", line)
        if match is None:
            raise DataError(f"{source}: line {number} does not begin with its number; expected ParlAI's text format")
        if match.group(1) == "1":
            dialogue = _Dialogue()
        content = match.group(2)
        if content.startswith(_PERSONA):
            dialogue.persona.append(content)
            continue
        turn, *rest = content.split("\t")
        if not rest or not rest[0].strip():
            raise DataError(f"{source}: line {number} has no reply; expected turn<TAB>reply<TAB><TAB>candidates")
        if not dialogue.persona:
            raise DataError(
                f"{source}: line {number} belongs to a dialogue without 'your persona:' lines; "
                "expected a file of the self-persona task (*_self_original.txt)"
            )
        dialogue.turns.append(f"Q: {turn.strip()}")
        context = "\n".join(dialogue.persona + dialogue.turns)
        yield {"instruction": f"{_TASK}\n\n{context}", "output": rest[0].strip()}
        dialogue.turns.append(f"R: {rest[0].strip()}")


def read_convai2_rows(path: Path) -> list[dict[str, Any]]:
    """Rows {instruction, output} of a file, one per reply, in the file's order."""
    rows = list(parse_dialogues(read_text(path), str(path)))
    if not rows:
        raise DataError(f"{path}: holds no dialogue turn; expected ParlAI's text format")
    return rows


def file_name(split: str) -> str:
    """The file ParlAI keeps a split in.

    Raises:
        DataError: there is no such split.
    """
    if split not in FILES:
        raise DataError(f"convai2 has no split {split!r}: choose train or validation")
    return FILES[split]


def local_file(split: str, data_dir: str | Path | None, variable: str) -> Path:
    """`convai2/{train,valid}_self_original.txt` of the data folder.

    Raises:
        DataError: no folder is named, or it lacks the file; says where to get it and where to put it.
    """
    name = file_name(split)
    advice = WHERE_FROM.format(name=name)
    if data_dir is None:
        raise DataError(f"{name}: no data folder is named; {advice} to DIR/convai2/, and set {variable}=DIR")
    path = Path(data_dir).expanduser() / "convai2" / name
    if not path.is_file():
        raise DataError(f"{path}: no such file; {advice} to {path.parent}")
    return path


def number_groups(instructions: list[str]) -> list[int]:
    """The group each row belongs to: rows that follow each other with the same context are one, with several
    references, as HiRA's evaluation of CONVAI2 has it."""
    groups: list[int] = []
    for index, instruction in enumerate(instructions):
        new = index == 0 or instruction != instructions[index - 1]
        groups.append((groups[-1] + 1 if groups else 0) if new else groups[-1])
    return groups


def group_references(
    groups: list[int], replies: list[str], references: list[str]
) -> tuple[list[str], list[list[str]]]:
    """Rows of the same group become one, with all their references; the first row's reply stands for all.

    Returns:
        (replies, references), one entry per group.
    """
    grouped: dict[int, tuple[str, list[str]]] = {}
    for group, reply, reference in zip(groups, replies, references, strict=True):
        grouped.setdefault(group, (reply, []))[1].append(reference)
    return [reply for reply, _ in grouped.values()], [several for _, several in grouped.values()]


def cut_reply(response: str) -> str:
    """The reply in a response: without one speaker mark before it, up to where the next line begins with one.

    The prompt itself shows "R:", so a model may repeat it. Inside a line a mark is part of what is said ("i like BBQ:
    ribs").
    """
    reply = re.sub(r"^(?:Q|R):", "", response.strip())
    return re.split(r"\n\s*(?:Q|R):|###", reply, maxsplit=1)[0].strip()


def cut_reply_as_hira(response: str) -> str:
    """The response up to the first "TARGET:", "Q:" or "R:" anywhere, as HiRA's `convai2_eval.py` cuts it."""
    for mark in ("TARGET:", *SPEAKER_MARKS):
        response = response.split(mark)[0]
    return response.strip()
