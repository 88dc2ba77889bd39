"""README's table of settings names every field that there is, and none that there isn't; its Python is Python."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from comlora_trl import ComLoRAConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Flags of scripts/sft.py alone
OF_THE_SCRIPT = {"comlora_prompt"}


def rows_of_settings() -> str:
    chapter = README.split("\n## Settings\n")[1].split("\n## ")[0]
    return "\n".join(line for line in chapter.splitlines() if line.startswith("| `--"))


def test_every_setting_has_a_row_and_every_row_is_a_setting():
    documented = set(re.findall(r"--(comlora_\w+)", rows_of_settings()))
    known = {field.name for field in fields(ComLoRAConfig) if field.name.startswith("comlora_")} | OF_THE_SCRIPT
    assert documented == known


def test_flags_anywhere_in_the_readme_exist():
    known = {field.name for field in fields(ComLoRAConfig)} | OF_THE_SCRIPT
    assert set(re.findall(r"--(comlora_\w+)", README)) <= known


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_compiles(code):
    compile(code, "README.md", "exec")


def test_the_map_of_the_code_names_what_exists():
    chapter = README.split("\n## Map of the code\n")[1].split("\n## ")[0]
    named = re.findall(r"`((?:comlora_trl|scripts|lm_eval_tasks|tests|studies)/[\w/.]*)`", chapter)
    assert named and all((ROOT / name).exists() for name in named)
