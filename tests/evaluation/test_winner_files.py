"""What an exported winner carries: its record, its card, its lm_eval.yaml, and a base that is found again."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from comlora_trl.cli.tables import main
from comlora_trl.data.files import tasks_folder
from comlora_trl.demo import DEMO_BASE, base_name, demo_model_path, resolve_base
from comlora_trl.evaluation import adapters
from comlora_trl.winner.card import write_card
from comlora_trl.winner.files import read_training_record, settings_of, training_record, write_winner_files
from comlora_trl.winner.folder import demo_base_sha256, weights_sha256

BRANCHES = [
    {"branch": 0, "validation_nll": 1.25, "score": 3.5, "share_of_wins": 0.75, "disqualified_at_step": None},
    {"branch": 1, "validation_nll": 1.5, "score": None, "share_of_wins": 0.25, "disqualified_at_step": 9},
]


def export(
    folder: Path,
    base: str = str(demo_model_path()),
    tokenizer: bool = True,
    target: Path | None = None,
    **given: object,
) -> Path:
    """An adapter's folder as the trainer leaves it, and our files beside."""
    folder.mkdir(parents=True)
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    summary = {"k": 2, "winner": 0, "validation_examples": 120, "branches": BRANCHES}
    (folder / "competition.json").write_text(json.dumps(summary))
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    record = training_record(base=base, **{"prompt_template": "comlora", "data": "demo", "seed": 0, **given})
    write_winner_files(folder, target=target or folder, record=record)
    assert read_training_record(folder) == record
    return folder


def test_the_record(tmp_path):
    folder = export(tmp_path / "winner", settings={"learning_rate": 2e-3})
    record = json.loads((folder / "training.json").read_text())
    assert record["base"] == {"name": DEMO_BASE, "revision": None, "sha256": demo_base_sha256()}
    assert record["prompt_template"] == "comlora" and record["settings"] == {"learning_rate": 2e-3}
    assert adapters.recorded_prompt(str(folder)) == "comlora"
    with pytest.raises(ValueError, match="unknown prompt template 'x'"):
        training_record(base="org/base", prompt_template="x")
    assert read_training_record(tmp_path) is None


def test_the_settings_are_those_that_decide(tmp_path):
    from comlora_trl import ComLoRAConfig

    settings = settings_of(ComLoRAConfig(str(tmp_path), comlora_k=4, learning_rate=1e-3, bf16=False, use_cpu=True))
    assert settings["comlora_k"] == 4 and settings["learning_rate"] == 1e-3
    assert settings["lr_scheduler_type"] == "linear" and settings["comlora_selector"] is True
    assert "output_dir" not in settings and "comlora_winner_dir" not in settings
    json.dumps(settings)


def test_lm_evals_own_configuration(tmp_path):
    """It names where the folder will be, not where it is written."""
    folder = export(tmp_path / "temporary", target=tmp_path / "winner")
    config = yaml.safe_load((folder / "lm_eval.yaml").read_text())
    winner = str(tmp_path / "winner")
    assert config["model_args"] == {"pretrained": str(demo_model_path()), "peft": winner, "tokenizer": winner}
    assert config["tasks"] == ["comlora_demo"] and config["include_path"] == str(tasks_folder())
    folder = export(tmp_path / "hub", base="org/base", tokenizer=False, base_revision="v2", data="ARC-Easy")
    config = yaml.safe_load((folder / "lm_eval.yaml").read_text())
    assert config["model_args"] == {"pretrained": "org/base", "peft": str(folder), "revision": "v2"}
    assert config["tasks"] == ["comlora_arc_easy"]


def test_the_embedded_base_is_found_after_the_project_has_moved(tmp_path):
    gone = "/gone/project/comlora_trl/demo/model"
    folder = export(tmp_path / "winner", base=gone)
    assert adapters.hf_arguments(str(folder), {})["pretrained"] == str(demo_model_path())
    assert resolve_base(gone) == resolve_base(DEMO_BASE) == str(demo_model_path())
    assert resolve_base("org/model") == base_name("org/model") == "org/model"
    elsewhere = tmp_path / "comlora_trl" / "demo" / "model"
    elsewhere.mkdir(parents=True)
    assert resolve_base(str(elsewhere)) == str(elsewhere), "one that is there is the one that is meant"


def test_another_edition_of_the_embedded_base_is_refused(tmp_path):
    folder = export(tmp_path / "winner")
    record = json.loads((folder / "training.json").read_text())
    record["base"]["sha256"] = "0" * 64
    (folder / "training.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="trained on another edition of the embedded base model.*pretrained=BASE"):
        adapters.hf_arguments(str(folder), {})


def test_a_hub_adapter_brings_its_tokenizer_and_the_bases_revision(tmp_path, monkeypatch):
    """lm_eval would ask the adapter's repository for the base's revision, hence the local copy."""
    import huggingface_hub

    folder = export(tmp_path / "cached", base="org/base", base_revision="v2", prompt_template="hira")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **given: asked.append(name) or str(folder))
    adapters._download.cache_clear()
    monkeypatch.chdir(tmp_path)
    local = str(folder)
    expected = {"pretrained": "org/base", "peft": local, "revision": "v2", "tokenizer": local}
    assert adapters.hf_arguments("org/adapter", {}) == expected
    assert adapters.vllm_arguments("org/adapter", {})["lora_local_path"] == local
    assert adapters.hf_arguments("org/adapter", {"revision": "x", "tokenizer": "y"}).keys() == {"pretrained", "peft"}
    assert adapters.recorded_prompt("org/adapter") == "hira" and asked == ["org/adapter"]
    adapters._download.cache_clear()


def test_a_hub_adapter_that_is_not_there_gets_one_line(monkeypatch):
    adapters._download.cache_clear()
    with pytest.raises(ValueError, match="org/none-such: no such folder, and not found on the hub") as caught:
        adapters.hf_arguments("org/none-such", {})
    assert "\n" not in str(caught.value)
    assert adapters.recorded_prompt("org/none-such") is None


def test_the_card_is_one_the_hub_takes(tmp_path):
    folder = export(
        tmp_path / "winner", base="org/base", base_revision="v2", data="org/data", settings={"comlora_k": 2}
    )
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "org/base" and card.data.library_name == "peft" and card.data.eval_results is None
    assert card.data.datasets == ["org/data"]
    text = card.text
    assert "# ComLoRA K=2 r=8" in text and "on `org/base`, revision `v2`." in text
    assert "| branch_0 | 1.2500 | 3.50 | 75% | winner, this adapter |" in text
    assert "| branch_1 | 1.5000 | – | 25% | disqualified at step 9 |" in text
    assert 'from_pretrained("org/base", revision="v2")' in text and "--max-lora-rank 8" in text
    assert "| `comlora_k` | 2 |" in text and "None" not in text
    (folder / "competition.png").write_bytes(b"")
    assert "![The competition](competition.png)" in write_card(folder).read_text()


def test_the_card_of_a_local_base_names_the_folder(tmp_path):
    folder = export(tmp_path / "winner", base="/models/mine")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model is None and "on the model in the folder `/models/mine`." in card.text
    text = (export(tmp_path / "demo") / "README.md").read_text()
    assert "on `comlora-trl/demo`" in text and "from_pretrained(demo_model_path())" in text


def write_results(folder: Path, sha: str, accuracy: float, rows: int = 600, day: int = 1) -> None:
    record = {
        "rows": rows,
        "expected_rows": 600,
        "data_sha256": "d" * 64,
        "prompt": "comlora",
        "adapter": {"sha256": sha},
    }
    record["decoding"] = {"do_sample": False, "max_gen_toks": 32}
    content = {
        "results": {"comlora_demo": {"acc,none": accuracy, "acc_stderr,none": 0.1, "alias": "x"}, "piqa": {"acc": 1}},
        "configs": {"comlora_demo": {"metadata": {"comlora": record}}},
        "n-samples": {"comlora_demo": {"original": 600, "effective": rows}},
        "config": {"model_args": {"peft": "winner/"}},
        "date": day,
    }
    folder.mkdir(exist_ok=True)
    (folder / f"results_2026-01-0{day}T10-00-00.1.json").write_text(json.dumps(content))


def test_scores_go_into_the_card_of_exactly_these_weights(tmp_path, monkeypatch, capsys):
    folder = export(tmp_path / "winner")
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path / "results", weights_sha256(folder), 0.8683)
    write_results(tmp_path / "results", "another", 0.1, day=2)

    assert main(["--card", "winner/"]) == 0

    [result] = ModelCard.load(folder / "README.md").data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("comlora_demo", "acc", 86.83)
    text = (folder / "README.md").read_text()
    assert "| `comlora_demo` | acc 86.83 | 600 of 600 rows, prompt comlora, greedy, 32 tokens |" in text
    assert "winner/README.md: comlora_demo acc 86.83" in capsys.readouterr().out


def test_a_card_without_scores_says_why(tmp_path, monkeypatch, capsys):
    folder = export(tmp_path / "winner")
    monkeypatch.chdir(tmp_path)
    assert main(["--card", "winner"]) == 1
    assert "no result file of lm_eval" in capsys.readouterr().err
    write_results(tmp_path / "results", "another", 0.1)
    assert main(["results", "--card", "winner"]) == 1
    said = capsys.readouterr().err
    assert "winner: none of the results is of its weights" in said and said.count("\n") == 1
    shutil.rmtree(folder)
    assert main(["results", "--card", "winner"]) == 1
    assert "winner: no such folder" in capsys.readouterr().err
