"""The winner is an ordinary LoRA: it loads without this package, and holds one rank-r adapter."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_lora, make_model
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file

from comlora_trl.competition import winner
from comlora_trl.training.export import export_checkpoint

IDS = torch.arange(3, 21).view(2, 9)


@pytest.fixture
def trained(train, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    trainer = train(
        comlora_k=3, double=False, save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4
    )
    return trainer


def test_winner_loads_as_plain_peft_and_gives_the_branchs_logits(trained, tmp_path):
    folder = Path(trained.args.winner_dir)
    branch = trained.competition.state.selection["winner"]
    trained.comlora_model.eval().set_adapter(f"branch_{branch}")
    expected = trained.comlora_model(input_ids=IDS).logits
    plain = PeftModel.from_pretrained(make_model(), folder).eval()
    assert torch.allclose(plain(input_ids=IDS).logits, expected, atol=1e-6)
    assert list(plain.peft_config) == ["default"]
    merged = plain.merge_and_unload()
    assert torch.allclose(merged(input_ids=IDS).logits, expected, atol=1e-4)

    config = folder / "adapter_config.json"
    base = {"base_model_name_or_path": str(tmp_path / "base")}
    config.write_text(json.dumps(json.loads(config.read_text()) | base))
    automatic = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.allclose(automatic(input_ids=IDS).logits, expected, atol=1e-6)


def test_winner_folder_holds_one_adapter_and_what_belongs_to_it(trained):
    folder = Path(trained.args.winner_dir)
    weights = load_file(folder / "adapter_model.safetensors")
    single = get_peft_model(make_model(), make_lora())
    assert sum(w.numel() for w in weights.values()) == single.get_nb_trainable_parameters()[0]
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "tokenizer.json", "README.md", "competition.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    assert not list(folder.parent.glob(".winner*"))  # no temporary folder is left


def test_export_from_a_checkpoint(trained, tmp_path):
    checkpoint = Path(trained.args.output_dir) / "checkpoint-8"
    branch = export_checkpoint(checkpoint, None, tmp_path / "again")
    assert branch == trained.competition.state.selection["winner"]
    first = load_file(Path(trained.args.winner_dir) / "adapter_model.safetensors")
    second = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert export_checkpoint(checkpoint, 2, tmp_path / "two") == 2
    with pytest.raises(ValueError, match="has no branch 3: choose one of 0..2, or all"):
        export_checkpoint(checkpoint, 3, tmp_path / "three")
    with pytest.raises(ValueError, match="is not a ComLoRA checkpoint"):
        export_checkpoint(tmp_path, None, tmp_path / "four")


def test_ties_go_to_the_lowest_index_and_the_disqualified_cannot_win():
    alive = torch.tensor([True, True, True])
    assert winner(torch.tensor([1.0, 2.0, 2.0]), alive) == 1
    assert winner(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([True, False, True])) == 2
    assert winner(torch.tensor([1.0, float("nan"), 0.5]), alive, highest=False) == 2
