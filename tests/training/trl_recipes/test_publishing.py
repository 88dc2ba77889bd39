"""What is saved and pushed is the winner, as an ordinary adapter with a card that works; no network."""

import fnmatch
import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_arguments, make_dataset, make_lora, make_model, make_tokenizer
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.training.checkpoints import load_state
from recipes import make_chat_tokenizer

IDS = torch.arange(3, 21).view(2, 9)


class Hub:
    """Stands for the hub: keeps a copy of what each upload would have put there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uploads = folder, []

    def create_repo(self, api: HfApi, name: str, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=f"someone/{name.split('/')[-1]}")

    def upload_folder(self, api: HfApi, *, folder_path: str, ignore_patterns: Any = (), **kwargs: Any) -> Any:
        target = self.folder / str(len(self.uploads))
        for file in Path(folder_path).rglob("*"):
            name = file.relative_to(folder_path).as_posix()
            if file.is_file() and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns or ()):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / name)
        self.uploads.append({"folder": target, **kwargs})
        future: Future = Future()
        future.set_result("commit")
        return future if kwargs.get("run_as_future") else "commit"

    def names(self, upload: int) -> set[str]:
        folder = self.uploads[upload]["folder"]
        return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: hub.create_repo(*args, **kwargs))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *args, **kwargs: hub.upload_folder(*args, **kwargs))
    return hub


def make_trainer(tmp_path: Path, tokenizer: Any = None, **options: Any) -> ComLoRASFTTrainer:
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    (tokenizer or make_tokenizer()).save_pretrained(base)
    config = ComLoRAConfig(**make_arguments(tmp_path / "out", comlora_k=3, max_steps=4, **options))
    given = {"train_dataset": make_dataset(), "eval_dataset": make_dataset(5), "peft_config": make_lora()}
    return ComLoRASFTTrainer(str(base), config, **given)


def branch_weights(trainer: ComLoRASFTTrainer, branch: int) -> dict[str, torch.Tensor]:
    mark = f".branch_{branch}."
    named = trainer.comlora_model.named_parameters()
    return {n.replace(mark, "."): p.detach().clone() for n, p in named if mark in n}


def test_pushes_hold_the_leader_in_training_and_the_winner_at_the_end(tmp_path, hub):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, push_to_hub=True, hub_model_id="someone/tiny", hub_always_push=True, **options)
    trainer.train()
    assert len(hub.uploads) == 2
    for upload, step in ((0, 2), (1, 4)):
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= hub.names(upload)
        assert not [name for name in hub.names(upload) if "branch_" in name or name.endswith("comlora.json")]
        pushed = load_file(hub.uploads[upload]["folder"] / "adapter_model.safetensors")
        folder = tmp_path / "out" / f"checkpoint-{step}"
        leader = load_state(folder).selection["winner"]
        kept = load_file(folder / f"branch_{leader}" / "adapter_model.safetensors")
        assert all(torch.equal(pushed[name], kept[name]) for name in kept)
    retired = tmp_path / "out" / "retired" / "branch_1" / "adapter_model.safetensors"
    retired.parent.mkdir(parents=True)
    retired.write_bytes(b"of a tournament")
    trainer.push_to_hub(dataset_name="someone/words")
    winner = branch_weights(trainer, trainer.determine_winner())
    pushed = load_file(hub.uploads[-1]["folder"] / "adapter_model.safetensors")
    assert pushed.keys() == winner.keys() and all(torch.equal(pushed[name], winner[name]) for name in winner)
    assert not [name for name in hub.names(-1) if name.startswith(("winner", "checkpoint", "branch", "retired"))]
    assert "competition.json" in hub.names(-1)
    assert hub.uploads[-1]["commit_message"] == "End of training" and hub.uploads[-1]["repo_id"] == "someone/tiny"
    assert "training.json" in hub.names(0) & hub.names(-1) and "lm_eval.yaml" not in hub.names(-1)
    assert (tmp_path / "out" / "lm_eval.yaml").is_file()
    card = ModelCard.load(hub.uploads[-1]["folder"] / "README.md")
    assert card.data.library_name == "peft" and card.data.datasets in ("someone/words", ["someone/words"])
    assert card.data.tags == ["comlora", "lora", "trl", "sft"]
    assert 'AutoTokenizer.from_pretrained("someone/tiny")' in card.text and "peft=someone/tiny --tasks" in card.text


def run_card(card: ModelCard, **given: Any) -> None:
    """Runs the card's Python, from the working directory."""
    for code in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        exec(code, given)


@pytest.mark.parametrize("make", [make_tokenizer, make_chat_tokenizer], ids=["plain", "chat"])
def test_what_the_card_says_works(tmp_path, make, capsys, monkeypatch):
    trainer = make_trainer(tmp_path, make())
    trainer.train()
    card = ModelCard.load(Path(trainer.args.winner_dir) / "README.md")
    assert "None" not in card.text and f"`{tmp_path / 'base'}`" in card.text
    assert card.data.base_model is None and card.data.library_name == "peft"
    assert ("apply_chat_template" in card.text) is (make is make_chat_tokenizer)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path / "out")
    run_card(card)
    assert "time machine" in capsys.readouterr().out
    assert (tmp_path / "out" / "merged" / "config.json").is_file()


def test_a_base_without_a_name_has_a_card_too(tmp_path, monkeypatch):
    given = {"train_dataset": make_dataset(), "eval_dataset": make_dataset(5), "peft_config": make_lora()}
    config = ComLoRAConfig(**make_arguments(tmp_path, max_steps=1))
    trainer = ComLoRASFTTrainer(make_model(), config, processing_class=make_tokenizer(), **given)
    trainer.train()
    winner = Path(trainer.args.winner_dir)
    card = ModelCard.load(winner / "README.md")
    assert "a model without a name" in card.text and "None" not in card.text and "vllm" not in card.text
    assert not (winner / "lm_eval.yaml").exists()
    monkeypatch.chdir(tmp_path)
    run_card(card, base_model=make_model())


def test_saved_as_trls_recipes_save_it_loads_as_they_load_it(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model(trainer.args.output_dir)
    trainer.save_model(str(tmp_path / "elsewhere"))
    expected = trainer.comlora_model.eval()(input_ids=IDS).logits
    plain = PeftModel.from_pretrained(make_model(), tmp_path / "elsewhere").eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)
    again = AutoPeftModelForCausalLM.from_pretrained(trainer.args.output_dir).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)
    assert not list((tmp_path / "elsewhere").glob("branch_*"))
