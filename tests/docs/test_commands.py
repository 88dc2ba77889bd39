"""The commands of README and of the pages that a newcomer reads are run, in their order, in one folder a page.

Each command is run as it is written, except that training is cut to a few steps and scoring to a few rows. MODEL and
DATA are a tiny model and a file. A block with a comment `<!-- not run: reason -->` before it is left out, and so are
installations and the test suite itself.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import exhaustive, make_dataset, make_model, make_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *exhaustive("docs/quickstart.md", "docs/tournament.md", "docs/evaluation.md")]
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?```(bash|python)\n(.*?)```", re.DOTALL)
COMMANDS = {f"comlora-{name}": f"comlora_trl.cli.{name}" for name in ("sft", "export", "eval", "tables", "plot")}
SCRIPTS = {"scripts/sft.py": "comlora-sft", "scripts/export_winner.py": "comlora-export"}
STEPS, ROWS = 8, 16


def blocks(page: str) -> list[tuple[str, str]]:
    """(kind, text) of the blocks of a page that are to be run."""
    found = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    return [(kind, text) for skipped, kind, text in found if not skipped]


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))]


def shortened(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """(environment, command) of a command of a page, which takes seconds."""
    environment = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if words[0] == "python" and words[1] in SCRIPTS:
        assert (ROOT / words[1]).is_file()
        words = [SCRIPTS[words[1]], *words[2:]]
    words = [{"MODEL": "model", "DATA": "data.json"}.get(word, word) for word in words]
    if words[0] == "comlora-sft":
        words += ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
        words += [] if "--max_steps" in words else ["--max_steps", str(STEPS)]
    if words[0] in ("lm_eval", "comlora-eval"):
        words += ["--limit", str(ROWS)]
    program = COMMANDS.get(words[0], words[0])
    return environment, [sys.executable, "-m", program, *words[1:]]


def run(command: list[str], folder: Path, **environment: str) -> str:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny model and data of one's own."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"instruction": row["prompt"], "output": row["completion"]} for row in make_dataset(64)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, folder):
    done = []
    for kind, text in blocks(page):
        if kind == "python":
            if "load_dataset" not in text:  # which needs the hub
                run([sys.executable, "-c", text], folder)
            continue
        for words in commands(text):
            if words[0] in ("pip", "pytest"):
                continue
            if page == "docs/evaluation.md" and not done:  # the page scores the winner of the default run
                run(shortened(["comlora-sft", "--comlora_k", "2"])[1], folder)
            environment, command = shortened(words)
            if (environment, command) not in done:
                run(command, folder, **environment)
                done.append((environment, command))
    assert done


PROGRAMS = [
    "studies/small_world/run.py",
    *exhaustive(
        *("studies/real_base/run.py", "studies/real_base/base.py", "studies/paper_tables/run.py"),
        *(f"benchmarks/{name}.py" for name in ("check_graphs", "host", "many_gpus", "peers", "run", "small")),
        *(f"scripts/{name}.py" for name in ("sft", "dpo", "export_winner")),
        *(f"tools/demo/{name}.py" for name in ("make_demo_data", "make_preferences", "pretrain_demo")),
        "tools/docs/generate.py",
    ),
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_starts_as_it_is_typed(program):
    """From the checkout, where no path but the program's own folder is known."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, program, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-2000:]
