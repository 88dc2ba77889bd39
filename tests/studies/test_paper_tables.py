"""`studies/paper_tables/run.py` and the recipes: every row of the paper's tables, planned, resumed, printed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from comlora_trl.cli import sft
from comlora_trl.data.demo import read_demo_rows
from comlora_trl.demo import demo_model_path
from comlora_trl.evaluation.conditions import COMMONSENSE
from comlora_trl.evaluation.results import paper

REPOSITORY = Path(__file__).parents[2]
STUDY = REPOSITORY / "studies" / "paper_tables"


def load_study():
    sys.path.insert(0, str(STUDY))  # its neighbours
    spec = importlib.util.spec_from_file_location("paper_tables_run", STUDY / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


reproduce = load_study()
planning = sys.modules["plan"]
RECIPES = sorted(planning.RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("table", paper()["tables"])
@pytest.mark.parametrize("scale", ["demo", "paper"])
def test_a_plan_has_the_papers_rows(table, scale, tmp_path):
    runs = reproduce.plan(table, scale, tmp_path, None, None)
    rows = {row["method"] for row in paper()["tables"][table]["rows"]}
    if table == "10":  # its branches come out of one run
        rows = {row for row in rows if "branch" not in row}
    assert {run.method for run in runs} == rows
    assert len(runs) == len(rows) * (5 if scale == "paper" else 1)
    assert len({run.folder for run in runs}) == len(runs)


def test_real_scale_is_table_4_on_a_small_pretrained_base(tmp_path, monkeypatch, capsys):
    """Three seeds of each row; another table, or a base that is not there, ends in one line."""
    runs = reproduce.plan("4", "real", tmp_path, None, None)
    assert {run.method for run in runs} == {row["method"] for row in paper()["tables"]["4"]["rows"]}
    assert len(runs) == 3 * len({run.method for run in runs})
    assert {run.row_passes // run.settings["comlora_k"] for run in runs} == {147 * 32}
    command = reproduce.training_command(runs[0], "python", [])
    script, training, model, _ = sft.parse_arguments([*command[2:], "--use_cpu", "true"])
    assert (model.model_name_or_path, script.dataset_name, training.max_steps) == ("smollm2", "convai2", 147)
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["--table", "3"], "--scale real has no --table 3: give --table 4, or another scale"),
        (["--figure", "2"], "--scale real has no --figure 2: give --table 4, or another scale"),
        (["--table", "4"], "write it with `python studies/real_base/base.py --output smollm2`"),
    ):
        with pytest.raises(SystemExit):
            reproduce.main([*arguments, "--scale", "real"])
        assert message in capsys.readouterr().err


def test_every_recipe_is_used_and_taken_by_sft(tmp_path):
    used = {run.recipe for table in paper()["tables"] for run in reproduce.plan(table, "demo", tmp_path, None, None)}
    assert used == {path.stem for path in RECIPES}
    for path in RECIPES:
        _, training, model, _ = sft.parse_arguments(["--config", str(path), "--use_cpu", "true"])
        settings = yaml.safe_load(path.read_text())
        assert training.comlora_k == settings["comlora_k"] and model.lora_r == settings["lora_r"]
        assert model.lora_alpha == 2 * model.lora_r


@pytest.mark.parametrize("scale", ["demo", "paper"])
def test_sft_takes_a_planned_command(tmp_path, scale):
    [run] = [run for run in reproduce.plan("2", scale, tmp_path, 1, "tiny") if run.recipe == "comlora_k4_r32"]
    command = reproduce.training_command(run, "accelerate launch", ["--max_steps", "2", "--bf16", "false"])
    assert command[:3] == ["accelerate", "launch", str(REPOSITORY / "scripts" / "sft.py")]
    script, training, model, _ = sft.parse_arguments([*command[3:], "--use_cpu", "true"])
    assert (training.max_steps, training.comlora_k, training.seed) == (2, 4, 0)
    assert training.comlora_winner_dir == str(run.folder / "winner")
    if scale == "paper":
        assert (model.model_name_or_path, script.dataset_name) == ("tiny", "mmlu") and run.tasks == "comlora_mmlu"


@pytest.mark.parametrize("scale", ["demo", "paper"])
@pytest.mark.parametrize("figure", ["2", "3"])
def test_sft_takes_a_figures_command(tmp_path, scale, figure):
    run = planning.plan_figure(figure, scale, tmp_path, "tiny")
    command = planning.training_command(run, "python", [])
    _, training, _, _ = sft.parse_arguments([*command[2:], "--bf16", "false", "--use_cpu", "true"])
    assert training.comlora_k == 4 and training.eval_strategy == "steps" and training.comlora_selector


@pytest.mark.parametrize("figure", ["2", "3"])
def test_a_figure_is_drawn_of_one_run(tmp_path, monkeypatch, capsys, figure):
    pytest.importorskip("matplotlib")
    done = pretend(monkeypatch)
    for _ in range(2):
        reproduce.main(["--figure", figure, "--output", str(tmp_path)])
    assert len(done) == 1, "trained once"
    assert (tmp_path / "demo" / f"figure{figure}.png").stat().st_size > 1000
    assert f"figure{figure}.png" in capsys.readouterr().out


def test_a_run_with_other_flags_is_not_taken_for_this_one(tmp_path):
    folder = planning.plan_figure("2", "demo", tmp_path, None).folder
    (folder / "winner").mkdir(parents=True)
    (folder / "winner" / "adapter_config.json").write_text("{}")
    (folder / reproduce.EXTRA_FILE).write_text('["--max_steps", "4"]')
    command = ["--figure", "2", "--dry_run", "--output", str(tmp_path)]
    with pytest.raises(
        SystemExit, match="was trained with --max_steps 4 after --, and this command has no flags: giv"
    ):
        reproduce.main(command)
    reproduce.main([*command, "--", "--max_steps", "4"])


def test_a_dry_run_lists_runs_and_cost_and_does_nothing(tmp_path, capsys):
    reproduce.main(["--table", "5", "--dry_run", "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "Table 5, scale demo: 5 runs, 0 done; 19,200 row passes left\n" in said
    assert "ComLoRA K=4 r=4, w/o selector, seed 0: 3,840 row passes" in said
    assert not (tmp_path / "out").exists()


VALUES = {"comlora/wins": 1.0, "eval_comlora/loss": 0.5, "eval_comlora/score": 2.0}
COMPETITION = {
    "k": 4,
    "winner": 1,
    "row_passes": 8,
    "rungs": [],
    "branches": [{}] * 4,
    "history": [{"step": 1} | {f"{name}_{branch}": value for name, value in VALUES.items() for branch in range(4)}],
}


def pretend(monkeypatch, fail_at: int | None = None) -> list[list[str]]:
    """Training and scoring that write what the next step looks for."""
    done: list[list[str]] = []

    def execute(command, log, environment=None):
        if fail_at == len(done):
            raise RuntimeError(f"it failed, see {log}")
        done.append(command)
        log.parent.mkdir(parents=True, exist_ok=True)
        if "--comlora_winner_dir" in command:
            winner = Path(command[command.index("--comlora_winner_dir") + 1])
            winner.mkdir(parents=True)
            (winner / "adapter_config.json").write_text('{"r": 4}')
            (winner / "competition.json").write_text(json.dumps(COMPETITION))
            (winner.parent / "output" / "checkpoint-40").mkdir(parents=True)
        elif "--branch" in command:
            for branch in range(4):
                folder = Path(command[-1]) / f"branch_{branch}"
                folder.mkdir(parents=True)
                (folder / "adapter_config.json").write_text('{"r": 8}')
        else:
            results = Path(command[command.index("--output_path") + 1])
            results.mkdir()
            values = {f"comlora_{task}": {"acc,none": 0.5} for task in COMMONSENSE}
            (results / "results_2026-01-01T10-00-00.json").write_text(json.dumps({"results": values}))

    monkeypatch.setattr(reproduce, "execute", execute)
    return done


def run_table(table: str, folder: Path) -> int:
    with pytest.raises(SystemExit) as caught:
        reproduce.main(["--table", table, "--output", str(folder), "--jobs", "1"])
    return caught.value.code


def test_an_interrupted_table_goes_on(tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, fail_at=3)  # while the second run is scored
    code = run_table("5", tmp_path)
    assert "it failed, see" in code and "the same command goes on from here" in code
    done = pretend(monkeypatch)
    assert run_table("5", tmp_path) == 0
    assert len(done) == 1 + 3 * 2, "the second run's score, and the other three"
    said = capsys.readouterr().out
    assert "Table 5, scale demo: 5 runs, 1 done; 11,520 row passes left, about" in said
    assert "[4/4] ComLoRA K=4 r=4, w/o selector, seed 0: 0 s; 0 row passes left" in said
    assert "| ComLoRA K=4 r=4, w/o L_LM | 1 run | **50.00** |" in said and "<u>81.25</u>" in said
    done = pretend(monkeypatch)
    assert run_table("5", tmp_path) == 0 and done == []


def test_table_10_scores_every_branch(tmp_path, monkeypatch, capsys):
    done = pretend(monkeypatch)
    assert run_table("10", tmp_path) == 0
    assert len(done) == 1 + 1 + 4
    said = capsys.readouterr().out
    assert all(f"| ComLoRA K=4 r=8, branch {branch} | 1 run |" in said for branch in (0, 2, 3)), "1 has won"
    assert "| ComLoRA K=4 r=8 | 1 run |" in said


def test_the_demos_test_set_has_the_eight_tasks(tmp_path):
    from comlora_trl.data.commonsense import read_test_rows

    folder = reproduce.demo_data(tmp_path) / "commonsense"
    rows = [len(read_test_rows(path / "test.json", path.name)) for path in sorted(folder.iterdir())]
    assert len(rows) == 8 and sum(rows) == 600


def test_a_failing_command_names_its_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"failed, see .*log: ValueError: no$"):
        reproduce.execute([sys.executable, "-c", "raise ValueError('no')"], tmp_path / "log")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_paper_scale_on_a_stand_in(tmp_path, monkeypatch, capsys):
    """The paper's own flags, in real processes: one row of Table 3 on a tiny random base and a few local rows."""
    content = planning.tables_file()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape)
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(planning, "tables_file", lambda: content | {"tables": {"3": ["comlora_k2_r8"]}})
    rows = [row for number, row in enumerate(read_demo_rows("test")) if number % 75 < 4]
    monkeypatch.setattr(reproduce, "read_demo_rows", lambda split: rows)
    monkeypatch.setenv("COMLORA_DATA_DIR", str(reproduce.demo_data(tmp_path)))
    data = tmp_path / "train.json"
    data.write_text(json.dumps(read_demo_rows("train")[:40]))
    arguments = ["--table", "3", "--scale", "paper", "--seeds", "1", "--model", str(tmp_path / "tiny")]
    extra = [
        "--dataset_name",
        str(data),
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--use_cpu",
        "true",
    ]
    with pytest.raises(SystemExit) as caught:
        reproduce.main([*arguments, "--output", str(tmp_path / "out"), "--", *extra, "--use_cpu", "true"])
    said = capsys.readouterr().out
    assert caught.value.code == 0, said
    assert "[1/1] ComLoRA K=2 r=8, seed 0:" in said and "| ComLoRA K=2 r=8 | 1 run |" in said
    winner = tmp_path / "out" / "paper" / "commonsense_170k" / "comlora_k2_r8" / "seed0" / "winner"
    competition = json.loads((winner / "competition.json").read_text())
    assert competition["row_passes"] == 2 * 2 * 4
