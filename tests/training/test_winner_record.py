"""What a run records with its winner, and in its checkpoints: read back by the evaluation."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import make_arguments, make_dataset, make_lora, make_model, make_tokenizer
from datasets import Dataset
from huggingface_hub import ModelCard

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.data import build_prompt
from comlora_trl.evaluation.adapters import describe, hf_arguments, recorded_prompt
from comlora_trl.training.export import export_checkpoint
from comlora_trl.winner.files import read_training_record
from comlora_trl.winner.folder import Adapter

pytestmark = pytest.mark.pictures

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_data(template: str, rows: int = 16) -> Dataset:
    """Instructions under a prompt template."""
    return make_dataset(rows).map(lambda row: {"prompt": build_prompt(row["prompt"], template)})


def make_trainer(base: Path | str, output: Path, template: str | None, **options: object) -> ComLoRASFTTrainer:
    config = ComLoRAConfig(**make_arguments(output, max_steps=4, comlora_prompt=template, **options))
    data = make_data(template or "comlora")
    given = {"train_dataset": data, "eval_dataset": data.select(range(5)), "peft_config": make_lora()}
    trainer = ComLoRASFTTrainer(str(base), config, processing_class=make_tokenizer(), **given)
    trainer.data_name = "boolq"
    return trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "base"
    make_model(max_position_embeddings=512).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> ComLoRASFTTrainer:
    """A tournament of three under LLM-Adapters' template, that retires one half-way."""
    options = {"comlora_k": 3, "comlora_rungs": "0.5:2", "comlora_branch_learning_rates": [1e-3, 1e-2, 2e-2]}
    options |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"comlora_selector": False, "seed": 7, "per_device_train_batch_size": 4}
    trainer = make_trainer(base, tmp_path_factory.mktemp("run") / "out", "llm_adapters", **options)
    trainer.train()
    return trainer


def test_the_record_of_a_run(trained, base):
    winner = Path(trained.args.winner_dir)
    record = read_training_record(winner)
    assert record["base"] == {"name": str(base), "revision": None}
    assert (record["prompt_template"], record["data"], record["seed"]) == ("llm_adapters", "boolq", 7)
    settings = record["settings"]
    assert settings["comlora_k"] == 3 and settings["comlora_branch_learning_rates"] == [1e-3, 1e-2, 2e-2]
    assert settings["learning_rate"] == 1e-2 and settings["max_steps"] == 4 and "comlora_prompt" not in settings
    assert record["versions"].keys() == {"comlora-trl", "trl", "peft", "transformers", "torch"}
    about = describe(winner)
    assert about["method"] == "ComLoRA K=3 r=4, w/o selector" and about["base"] == str(base)
    assert recorded_prompt(str(winner)) == "llm_adapters"
    config = json.loads((winner / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


def test_lm_evals_configuration_names_the_winner_where_it_is(trained, base):
    winner = str(Path(trained.args.winner_dir).absolute())
    config = yaml.safe_load((Path(winner) / "lm_eval.yaml").read_text())
    assert config["model_args"] == {"pretrained": str(base), "peft": winner, "tokenizer": winner}
    assert config["tasks"] == ["comlora_boolq"]
    assert hf_arguments(winner, {}) == {"pretrained": str(base), "tokenizer": winner}


def test_the_card_of_a_run(trained):
    winner = Path(trained.args.winner_dir)
    card = ModelCard.load(winner / "README.md")
    assert card.text.startswith("\n# ComLoRA K=3 r=4, w/o selector\n")
    assert "| branch | rate | validation NLL | token accuracy | wins |  |" in card.text
    state = trained.competition.state
    line = next(line for line in card.text.splitlines() if line.startswith(f"| branch_{state.leader} "))
    assert "winner, this adapter" in line
    [retired] = state.retired
    assert "retired at step 2 |" in next(li for li in card.text.splitlines() if li.startswith(f"| branch_{retired} "))
    assert "template `llm_adapters`" in card.text and "Trained on `boolq`." in card.text
    assert json.dumps(build_prompt("X", "llm_adapters").split("X")[0])[1:-1] in card.text
    for part in (
        "| `comlora_branch_learning_rates` | [0.001, 0.01, 0.02] |",
        "Made with comlora-trl",
        "@inproceedings",
    ):
        assert part in card.text
    if importlib.util.find_spec("matplotlib"):
        assert "![The competition](competition.png)" in card.text and (winner / "competition.png").is_file()


def test_a_picture_that_fails_costs_no_winner(trained, tmp_path, monkeypatch, caplog):
    def fail(folder: Path) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("comlora_trl.plots.draw", fail)
    export_checkpoint(Path(trained.args.output_dir) / "checkpoint-4", None, tmp_path / "winner")
    assert "no picture of the competition (RuntimeError: no fonts)" in caplog.text
    assert (tmp_path / "winner" / "README.md").is_file()


def test_a_retired_branch_says_which_it_is(trained, tmp_path):
    [retired] = trained.competition.state.retired
    folder = Path(trained.args.output_dir) / "retired" / f"branch_{retired}"
    assert Adapter.read(folder).method == f"ComLoRA K=3 r=4, w/o selector, branch {retired}"
    assert recorded_prompt(str(folder)) == "llm_adapters"
    [line] = [line for line in Adapter.read(folder).competition["branches"] if line["branch"] == retired]
    assert line["retired_at_step"] == 2
    # what it lacks of a winner's, a tokenizer and a card, comes with an export
    files = {"adapter_config.json", "adapter_model.safetensors", "competition.json", "training.json"}
    assert {file.name for file in folder.iterdir()} == files
    exported = tmp_path / f"branch_{retired}"
    export_checkpoint(Path(trained.args.output_dir) / "checkpoint-4", retired, exported)
    card = (exported / "README.md").read_text()
    assert f"peft=branch_{retired}/ --tasks comlora_boolq" in card and (exported / "tokenizer.json").is_file()
    assert "this adapter" in next(line for line in card.splitlines() if line.startswith(f"| branch_{retired} "))
    assert (exported / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


def test_checkpoints_carry_the_record_to_what_is_exported_from_them(trained, tmp_path):
    checkpoint = Path(trained.args.output_dir) / "checkpoint-4"
    record = read_training_record(trained.args.winner_dir)
    assert read_training_record(checkpoint) == record
    assert Adapter.read(checkpoint).method == "ComLoRA K=3 r=4, w/o selector"
    branch = export_checkpoint(checkpoint, None, tmp_path / "again")
    assert branch == trained.determine_winner() and read_training_record(tmp_path / "again") == record
    assert f"peft={tmp_path}/again\n" in (tmp_path / "again" / "lm_eval.yaml").read_text().replace("  peft: ", "peft=")
    assert "winner, this adapter" in (tmp_path / "again" / "README.md").read_text()


def test_one_branch_without_a_selector_is_called_lora(base, tmp_path):
    """Seen: `--comlora_k 1 --comlora_selector false` was called "ComLoRA K=1"."""
    trainer = make_trainer(base, tmp_path / "out", None, comlora_k=1, comlora_selector=False)
    trainer.train()
    winner = Path(trainer.args.winner_dir)
    assert describe(winner)["method"] == "LoRA r=4" and recorded_prompt(str(winner)) is None
    text = (winner / "README.md").read_text()
    assert "\n# LoRA r=4\n" in text and "The competition" not in text


def test_a_base_on_the_hub_is_recorded_by_its_commit(base, tmp_path, monkeypatch):
    cached = tmp_path / "models--org--base"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "snapshots" / COMMIT).symlink_to(base)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    trainer = make_trainer("org/base", tmp_path / "out", None)
    trainer.train()
    winner = Path(trainer.args.winner_dir)
    assert read_training_record(winner)["base"] == {"name": "org/base", "revision": COMMIT}
    assert json.loads((winner / "adapter_config.json").read_text())["revision"] == COMMIT
    card = ModelCard.load(winner / "README.md")
    assert card.data.base_model == "org/base" and f'from_pretrained("org/base", revision="{COMMIT}")' in card.text


def test_a_template_that_the_prompts_are_not_of_is_refused(base, tmp_path):
    config = ComLoRAConfig(**make_arguments(tmp_path / "out", comlora_prompt="hira"))
    given = {"train_dataset": make_data("llm_adapters"), "processing_class": make_tokenizer()}
    with pytest.raises(ValueError, match="comlora_prompt='hira' is not what the training dataset's prompts are built"):
        ComLoRASFTTrainer(str(base), config, **given)
    with pytest.raises(ValueError, match="comlora_prompt='x' is not possible: it must be one of comlora, llm"):
        ComLoRAConfig(str(tmp_path), use_cpu=True, bf16=False, comlora_prompt="x")


def test_it_is_scored_under_the_template_it_was_trained_under(trained, tmp_path, monkeypatch, capsys):
    """Seen: it was scored under the default template without a word."""
    cli = pytest.importorskip("lm_eval.__main__")
    row = {"instruction": "Is 2 even?", "output": "the correct answer is true", "answer": "true"}
    (tmp_path / "data" / "commonsense" / "boolq").mkdir(parents=True)
    (tmp_path / "data" / "commonsense" / "boolq" / "test.json").write_text(json.dumps([row] * 4))
    monkeypatch.setenv("COMLORA_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    winner = trained.args.winner_dir
    command = ["run", "--config", f"{winner}/lm_eval.yaml", "--device", "cpu", "--output_path", "results"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command])
    cli.cli_evaluate()
    [file] = (tmp_path / "results").rglob("results*.json")
    measured = json.loads(file.read_text())["configs"]["comlora_boolq"]["metadata"]["comlora"]
    assert measured["prompt"] == "llm_adapters" and measured["adapter"]["method"] == "ComLoRA K=3 r=4, w/o selector"
    assert "llm_adapters" in capsys.readouterr().err
