"""The eight commonsense tasks (Hu et al. 2023), and the answer as the first keyword of a response."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_FIVE_ANSWERS = ("answer1", "answer2", "answer3", "answer4", "answer5")


@dataclass(frozen=True)
class CommonsenseTask:
    """One task.

    Attributes:
        keywords: what counts as an answer.
        test_rows: rows of the full public test file.
    """

    keywords: tuple[str, ...]
    test_rows: int


COMMONSENSE_TASKS: dict[str, CommonsenseTask] = {
    "boolq": CommonsenseTask(("true", "false"), 3270),
    "piqa": CommonsenseTask(("solution1", "solution2"), 1838),
    "social_i_qa": CommonsenseTask(_FIVE_ANSWERS, 1954),
    "hellaswag": CommonsenseTask(("ending1", "ending2", "ending3", "ending4"), 10042),
    "winogrande": CommonsenseTask(("option1", "option2"), 1267),
    "ARC-Easy": CommonsenseTask(_FIVE_ANSWERS, 2376),
    "ARC-Challenge": CommonsenseTask(_FIVE_ANSWERS, 1172),
    "openbookqa": CommonsenseTask(_FIVE_ANSWERS, 500),
}


def first_keyword(response: str, keywords: Sequence[str], whole_word: bool = False) -> str:
    """The keyword that begins first in the response, or "" when there is none.

    As LLM-Adapters has it: case matters, and a keyword may sit inside a longer word ("untrue" is true, "answer10" is
    answer1).

    Args:
        response: the generated text.
        keywords: the answers to look for.
        whole_word: a keyword must stand alone (for the letters A to D, which begin many a word).
    """
    pattern = "|".join(map(re.escape, keywords))
    match = re.search(rf"\b(?:{pattern})\b" if whole_word else pattern, response)
    return match.group() if match else ""


# Words that can follow the letter A as an answer; an article is followed by a noun or what describes one
_AFTER_ANSWER = (
    "is was are were be am has have had does do did will would can could may might must should shall seems looks "
    "because since as for so if when while though although and or but nor not than then that which who whose where "
    "in on at by of to from with without over under before after only alone also too instead rather"
)
_ARTICLE = re.compile(rf"\bA[ \t]+(?!(?i:{'|'.join(_AFTER_ANSWER.split())})\b)(?=\w)")


def first_letter(response: str, letters: Sequence[str]) -> str:
    """The letter that stands alone first in the response, or "" when there is none; "A" as an article is none.

    "A good answer would be B" gives B; "A is right", "A because ...", "A.", "(A)" give A.

    Args:
        response: the generated text.
        letters: the answers to look for.
    """
    return first_keyword(_ARTICLE.sub("", response), letters, whole_word=True)
