"""The prompt around an instruction: one function for training and evaluation.

The Alpaca templates say the same words and differ in white space only, which is enough to cost an adapter accuracy
when it is scored under another one than it was trained under. `plain` adds nothing: it is for chat templates.
"""

_PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

DEFAULT_TEMPLATE = "comlora"
CHAT_TEMPLATE = "plain"
PROMPT_TEMPLATES: dict[str, str] = {
    "comlora": _PREAMBLE + "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    # LLM-Adapters (Hu et al. 2023): a triple-quoted string inside an indented function, its indentation included
    "llm_adapters": _PREAMBLE
    + " \n\n                ### Instruction:\n                {instruction}"
    + "\n\n                ### Response:\n                ",
    "hira": _PREAMBLE + "  \n\n### Instruction:\n{instruction}\n\n### Response:\n",
    "plain": "{instruction}",
}


def build_prompt(instruction: str, template: str = DEFAULT_TEMPLATE) -> str:
    """The prompt of an instruction, up to where the response begins.

    Args:
        instruction: the instruction, inserted as it is (its own further lines are not indented).
        template: a key of `PROMPT_TEMPLATES`.

    Raises:
        ValueError: for a template of another name.
    """
    head, tail = _around(template)
    return head + instruction + tail


def is_built_with(prompt: object, template: str) -> bool:
    """Whether a data set's prompt could be [`build_prompt`]'s; a conversation never is.

    Raises:
        ValueError: for a template of another name.
    """
    head, tail = _around(template)
    return isinstance(prompt, str) and prompt.startswith(head) and prompt.endswith(tail)


def _around(template: str) -> tuple[str, str]:
    check_template(template)
    head, tail = PROMPT_TEMPLATES[template].split("{instruction}")
    return head, tail


def check_template(template: str) -> None:
    """Raises a ValueError for a name that is not in `PROMPT_TEMPLATES`."""
    if template not in PROMPT_TEMPLATES:
        raise ValueError(f"unknown prompt template {template!r}: choose one of {', '.join(PROMPT_TEMPLATES)}")
