"""lm_eval's own command on a winner of `scripts/sft.py`, in fresh environments and outside the repository."""

import json
from pathlib import Path

import pytest
from conftest import exhaustive
from environments import REPOSITORY, Environment, run

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

SEVEN = ["boolq", "piqa", "social_i_qa", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
in_one_of_them = pytest.mark.parametrize("environment", ["wheel"], indirect=True)
GROUPS = "comlora_commonsense,comlora_mmlu,comlora_convai2,comlora_demo"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A folder with `winner/`, left there by the default training run, cut to three steps.

    It is in a folder called `lm_eval_tasks`, and has one of that name and others that are named like our modules.
    """
    folder = tmp_path_factory.mktemp("elsewhere") / "lm_eval_tasks"
    for name in ("lm_eval_tasks", "comlora_trl", "comlora_lm_eval_hook"):
        (folder / name).mkdir(parents=True)
        (folder / name / "notes.txt").write_text("results")
    script = str(REPOSITORY / "scripts" / "sft.py")
    done = run([script, "--comlora_k", "2", "--max_steps", "3", "--eval_strategy", "no"], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module", params=["wheel", *exhaustive("editable", "editable lm_eval")])
def environment(request, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.install_lm_eval("editable" if request.param == "editable lm_eval" else "linked")
    environment.install_ours("editable" if request.param == "editable" else "wheel")
    code = "import lm_eval, comlora_trl; print(lm_eval.__file__, comlora_trl.__file__)"
    places = environment.run("-c", code).stdout.split()
    folder = environment.folder
    expected = [
        folder / "lm_eval_source" if request.param == "editable lm_eval" else environment.packages,
        folder / "source" if request.param == "editable" else environment.packages,
    ]
    assert all(Path(place).is_relative_to(where) for place, where in zip(places, expected, strict=True)), places
    return environment


def score(environment: Environment, folder: Path, tasks: list[str], **variables: str) -> dict[str, dict]:
    """Results of README's command, on a few questions."""
    command = ["-m", "lm_eval", "--model", "hf", "--model_args", "peft=winner/", "--tasks", ",".join(tasks)]
    options = [
        "--limit",
        "4",
        "--device",
        "cpu",
        "--batch_size",
        "4",
        "--output_path",
        str(environment.folder / "out"),
    ]
    done = environment.run(*command, *options, folder=folder, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "comlora-trl: from peft=winner/: pretrained=" in done.stderr
    file = max((environment.folder / "out").rglob("results*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(file.read_text())["results"]


def test_the_stock_command_runs_the_demo(environment, elsewhere):
    results = score(environment, elsewhere, ["comlora_demo"])
    assert 0 <= results["comlora_demo"]["acc,none"] <= 1


@pytest.mark.exhaustive
def test_the_stock_command_runs_seven_tasks_by_name(environment, elsewhere, shared_data):
    names = [f"comlora_{task}" for task in SEVEN]
    results = score(environment, elsewhere, names, COMLORA_DATA_DIR=str(shared_data))
    assert sorted(results) == sorted(names) and all("acc,none" in result for result in results.values())


@in_one_of_them
def test_the_stock_command_validates_every_task(environment, elsewhere):
    done = environment.run("-m", "lm_eval", "validate", "--tasks", GROUPS, folder=elsewhere)
    assert "All tasks found and valid" in done.stdout, done.stderr[-2000:]


@pytest.mark.exhaustive
@in_one_of_them
def test_switched_off_only_our_own_command_knows_the_tasks(environment, elsewhere):
    command = ["validate", "--tasks", "comlora_demo"]
    stock = environment.run("-m", "lm_eval", *command, folder=elsewhere, COMLORA_LM_EVAL_HOOK="0")
    assert stock.returncode != 0 and "comlora_demo" in stock.stdout + stock.stderr
    script = str(environment.folder / "venv" / "bin" / "comlora-eval")
    ours = environment.run(script, *command, folder=elsewhere, COMLORA_LM_EVAL_HOOK="0")
    assert "All tasks found and valid" in ours.stdout, ours.stderr[-2000:]


@in_one_of_them
@pytest.mark.parametrize("how", ["isolated", *exhaustive("unwritable subprocess")])
def test_the_hook_works_however_python_starts(environment, elsewhere, how):
    """-I; where no bytecode can be written, as in a read-only site-packages; from another process."""
    command = ["-m", "lm_eval", "validate", "--tasks", "comlora_demo"]
    variables = {}
    if how == "unwritable subprocess":
        code = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)"
        command, variables = ["-c", code, *command], {"PYTHONPYCACHEPREFIX": "/proc/none"}
    done = environment.run(*(["-I"] if how == "isolated" else []), *command, folder=elsewhere, **variables)
    assert "All tasks found and valid" in done.stdout, done.stderr[-2000:]
    assert "left as it is" not in done.stderr


@in_one_of_them
def test_the_hook_is_there_in_spawned_processes(environment, elsewhere):
    (elsewhere / "spawning.py").write_text(
        "import multiprocessing, sys\n"
        "def hooked():\n"
        "    sys.exit(0 if any(f.__module__ == 'comlora_lm_eval_hook' for f in sys.meta_path) else 3)\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=hooked)\n"
        "    child.start(); child.join(); print(child.exitcode)\n"
    )
    assert environment.run("spawning.py", folder=elsewhere).stdout == "0\n"


WRITE_FILES = """
from comlora_trl.demo import demo_model_path
from comlora_trl.winner.files import training_record, write_winner_files
record = training_record(base=str(demo_model_path()), prompt_template="comlora", data="demo", seed=0)
write_winner_files("winner", target="winner", record=record)
"""


@in_one_of_them
def test_lm_evals_own_configuration_needs_no_hook(environment, elsewhere):
    # -P: the folder here that is named like the package hides it in no wheel, but does so in an editable install
    done = environment.run("-P", "-c", WRITE_FILES, folder=elsewhere)
    assert done.returncode == 0, done.stderr
    command = ["-m", "lm_eval", "run", "--config", "winner/lm_eval.yaml", "--limit", "4", "--device", "cpu"]
    output = str(environment.folder / "configured")
    done = environment.run(*command, "--output_path", output, folder=elsewhere, COMLORA_LM_EVAL_HOOK="0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rows scored: comlora_demo 4 of 600" in done.stderr and "|comlora_demo|" in done.stdout
    [file] = (environment.folder / "configured").rglob("results*.json")
    record = json.loads(file.read_text())["configs"]["comlora_demo"]["metadata"]["comlora"]
    assert record["prompt"] == "comlora" and len(record["adapter"]["sha256"]) == 64


def test_nothing_of_a_common_name_is_installed(environment, elsewhere):
    code = "import importlib.util as u, importlib.metadata as m; print(u.find_spec('lm_eval_tasks'), *sorted("
    code += "f'{e.group}={e.value}' for e in m.distribution('comlora-trl').entry_points if 'lm_eval' in e.group))"
    expected = "None lm_eval.models=comlora_trl.evaluation.models:ComLoRALM lm_eval.tasks=comlora_trl.lm_eval_tasks\n"
    assert environment.run("-P", "-c", code, folder=elsewhere).stdout == expected
    # how lm_eval's pull request 4015 finds the folder of an entry point
    code = "import importlib.util as u; print(u.find_spec('comlora_trl.lm_eval_tasks').submodule_search_locations[0])"
    found = Path(environment.run("-P", "-c", code, folder=elsewhere).stdout.strip())
    assert (found / "demo" / "comlora_demo.yaml").is_file()


def test_checksums_and_demo_are_installed(environment, elsewhere):
    code = "from comlora_trl.data.files import llm_adapters_checksums as c; from comlora_trl.demo import *;"
    code += "print(len(c()), all(demo_data_path(s).is_file() for s in DEMO_SPLITS), demo_model_path().is_dir())"
    assert environment.run("-P", "-c", code, folder=elsewhere).stdout.split() == ["9", "True", "True"]


@in_one_of_them
def test_an_installation_has_every_command_and_trains_the_embedded_example(environment, tmp_path):
    programs = Path(environment.python).parent
    for name in ("sft", "export", "eval", "tables", "plot"):
        done = environment.run(str(programs / f"comlora-{name}"), "--help", folder=tmp_path)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-2000:]
    steps = ["--max_steps", "3", "--save_strategy", "steps", "--save_steps", "3", "--use_cpu"]
    done = environment.run(str(programs / "comlora-sft"), "--comlora_k", "2", *steps, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "winner" / "adapter_model.safetensors").is_file()
    export = [str(programs / "comlora-export"), "comlora-output/checkpoint-3", "--branch", "all", "--output", "all"]
    assert environment.run(*export, folder=tmp_path).returncode == 0
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"branch_0", "branch_1"}
