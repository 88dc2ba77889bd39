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
        test_sha1: git blob SHA-1 of that file at the pinned commit.
    """

    keywords: tuple[str, ...]
    test_rows: int
    test_sha1: str


COMMONSENSE_TASKS: dict[str, CommonsenseTask] = {
    "boolq": CommonsenseTask(("true", "false"), 3270, "6d7edb0a8e8a6566b546ccf0d98d24e48db3fdf3"),
    "piqa": CommonsenseTask(("solution1", "solution2"), 1838, "f7a1c260692ef31796d4763cb6334f316a754fed"),
    "social_i_qa": CommonsenseTask(_FIVE_ANSWERS, 1954, "eadf221799ca394367b144c0f86ee0436db409d2"),
    "hellaswag": CommonsenseTask(
        ("ending1", "ending2", "ending3", "ending4"), 10042, "183c4920415f83ba4b793c4873a33e7e10bd1be5"
    ),
    "winogrande": CommonsenseTask(("option1", "option2"), 1267, "21257263593dd4d00546e1918c88ca0f357b08ad"),
    "ARC-Easy": CommonsenseTask(_FIVE_ANSWERS, 2376, "6c0d30aaedaeca148df6bcd7aaacf7c31e6ad70f"),
    "ARC-Challenge": CommonsenseTask(_FIVE_ANSWERS, 1172, "9540685439144200b5a7e48dab9ca4655be2af09"),
    "openbookqa": CommonsenseTask(_FIVE_ANSWERS, 500, "a6e69676104bcb77237388c3b5a3f0dcbb81d1e2"),
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
