"""`comlora-sft` takes TRL's flags, in this process: data of one's own, without a GPU, from an adapter."""

import json
import logging
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from conftest import make_dataset, make_model, make_tokenizer
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from comlora_trl import ComLoRASFTTrainer
from comlora_trl.cli import sft as sft_command
from comlora_trl.competition.rungs import default_rungs
from comlora_trl.data import build_prompt
from comlora_trl.demo import demo_recipe_path
from comlora_trl.winner.files import read_training_record

SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return sft_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny base, and data: a file, and a folder with the splits train and test of another text field."""
    folder = tmp_path_factory.mktemp("recipes")
    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    rows = list(make_dataset(20))
    (folder / "my.json").write_text(json.dumps(rows))
    stories = [{"story": row["prompt"] + row["completion"]} for row in rows]
    (folder / "stories.json").write_text(json.dumps(stories))
    make_dataset(20).to_parquet(folder / "splits" / "train.parquet")
    make_dataset(6).to_parquet(folder / "splits" / "test.parquet")
    return folder


@pytest.fixture
def trainers(script, monkeypatch) -> list[ComLoRASFTTrainer]:
    """The trainers that the script has made."""
    made = []

    class Recorded(ComLoRASFTTrainer):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(script, "ComLoRASFTTrainer", Recorded)
    return made


@pytest.fixture
def sft(script, folder, tmp_path, monkeypatch):
    """Runs the script from an empty folder, on the tiny base."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: object, short: bool = True) -> None:
        script.main([*map(str, flags), *(["--model_name_or_path", str(folder / "base"), *SHORT] if short else [])])

    return run


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_data_of_ones_own_without_a_gpu(sft, folder, caplog):
    with caplog.at_level(logging.WARNING):
        sft("--dataset_name", folder / "my.json", "--max_steps", 1, "--report_to", "none", short=False)
    assert caplog.text.count("no GPU is found: training on the CPU, in float32") == 1
    AutoPeftModelForCausalLM.from_pretrained("winner")
    AutoPeftModelForCausalLM.from_pretrained("comlora-output")  # where TRL's own script leaves its adapter


def test_a_wrong_data_name_is_answered_about_the_data(sft):
    with pytest.raises(SystemExit, match="error: no/such.data: not a preset .*, not a local file or folder"):
        sft("--dataset_name", "no/such.data", short=False)


def test_a_row_without_its_completion(sft, tmp_path):
    rows = [*make_dataset(4), {"prompt": "reverse abc:"}]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    with pytest.raises(SystemExit, match="error: row 4 of the training dataset has no completion: fill it in"):
        sft("--dataset_name", tmp_path / "mine.json")


def test_a_checkpoint_that_is_not_there(sft, folder):
    with pytest.raises(SystemExit, match="error: --resume_from_checkpoint nowhere is not a folder: give one of coml"):
        sft("--dataset_name", folder / "my.json", "--resume_from_checkpoint", "nowhere")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--comlora_tournament", "--comlora_rungs", "0.5:2,0.6:1"], "comlora_rungs='0.5:2,0.6:1' is not possible"),
        (["--resume_from_checkpoint", "."], r"\. is not a ComLoRA checkpoint"),
        (["--per_device_train_batch_size", "0"], "batch_size"),
    ],
)
def test_what_only_the_training_can_check_ends_in_one_line(sft, folder, flags, line):
    with pytest.raises(SystemExit, match=f"error: .*{line}"):
        sft("--dataset_name", folder / "my.json", "--comlora_validation_size", 4, "--use_cpu", *SHORT, *flags,
            "--model_name_or_path", folder / "base", short=False)  # fmt: skip


def test_an_error_after_the_first_step_keeps_its_traceback(sft, folder, script, monkeypatch):
    class Failing(ComLoRASFTTrainer):
        def training_step(self, *args, **kwargs):
            raise ValueError("a fault of the code")

    monkeypatch.setattr(script, "ComLoRASFTTrainer", Failing)
    with pytest.raises(ValueError, match="a fault of the code"):
        sft("--dataset_name", folder / "my.json", "--use_cpu")


def test_what_is_not_installed(sft, folder, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("the package is not installed")

    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", missing)
    with pytest.raises(SystemExit, match="error: the package is not installed"):
        sft("--dataset_name", folder / "my.json")


def test_text_fields(sft, folder, trainers):
    sft("--dataset_name", folder / "stories.json", "--dataset_text_field", "story")
    assert trainers[0].state.global_step == 2
    with pytest.raises(SystemExit, match="has the columns story; .* --dataset_text_field"):
        sft("--dataset_name", folder / "stories.json")
    with pytest.raises(SystemExit, match="--dataset_text_field story does nothing with .*my.json, which has the colu"):
        sft("--dataset_name", folder / "my.json", "--dataset_text_field", "story")


@pytest.mark.parametrize("flags, recorded", [([], "comlora"), (["--comlora_prompt", "llm_adapters"], "llm_adapters")])
def test_instruction_data_is_built_with_the_template_that_is_recorded(sft, tmp_path, trainers, flags, recorded):
    rows = [{"instruction": f"Say {word}", "output": word} for word in "abcdefgh"]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    sft("--dataset_name", "mine.json", *flags)
    record = read_training_record("winner")
    assert record["prompt_template"] == recorded and record["data"] == str(tmp_path / "mine.json")
    prompt = trainers[0].processing_class.decode(trainers[0].train_dataset[0]["input_ids"])
    assert build_prompt("Say ", recorded).split("Say ")[0] in prompt


def test_prompts_of_ones_own_record_no_template(sft, folder):
    sft("--dataset_name", folder / "my.json")
    assert read_training_record("winner")["prompt_template"] is None


def test_test_splits_are_evaluated(sft, folder, trainers, capsys):
    common = ["--dataset_name", folder / "splits", "--comlora_overwrite_winner"]
    sft(*common, "--eval_strategy", "steps", "--eval_steps", 1)
    assert len(trainers[-1].eval_dataset) == 6 and "the split 'test' of" in capsys.readouterr().out
    sft(*common, "--dataset_test_split", "train")
    assert len(trainers[-1].eval_dataset) == 20
    sft(*common)
    assert len(trainers[-1].eval_dataset) == 2 and len(trainers[-1].train_dataset) == 18
    with pytest.raises(SystemExit, match="no data of the split 'dev'|dev"):
        sft(*common, "--dataset_test_split", "dev")


def test_from_an_adapter(sft, folder, trainers):
    sft("--dataset_name", folder / "my.json", "--lora_r", 2, "--use_rslora")
    first = load_file("winner/adapter_model.safetensors")
    common = ["--dataset_name", folder / "my.json", *SHORT, "--model_name_or_path", "winner"]
    sft(*common, "--comlora_winner_dir", "second", "--max_steps", 1, "--learning_rate", 0, short=False)
    assert trainers[-1].comlora_model.peft_config["branch_1"].use_rslora
    weights = {n: p for n, p in trainers[-1].comlora_model.named_parameters() if ".branch_0." in n}
    assert all(torch.equal(first[n.replace(".branch_0.", ".")], p) for n, p in weights.items())
    with pytest.raises(SystemExit, match="asks for lora_alpha=16|asks for r=4"):
        sft(*common, "--comlora_winner_dir", "third", "--lora_r", 4, short=False)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--use_peft", "false"], "--use_peft false is not possible"),
        (["--lora_task_type", "SEQ_CLS"], "--lora_task_type SEQ_CLS is not possible"),
        (["--dataset_config", "plain"], "--dataset_config does nothing with a preset or a file"),
        (["--test_split_size", "0.1"], "--test_split_size does nothing without a mixture"),
        (["--bnb_4bit_quant_type", "fp4"], "--bnb_4bit_quant_type does nothing without --load_in_4bit"),
        (["--ignore_bias_buffers"], "--ignore_bias_buffers does nothing"),
        (["--comlora_selector", "false", "--comlora_top_n", "1"], "comlora_top_n=1 does nothing"),
        (["--comlora_prompt", "hira"], "--comlora_prompt does nothing with"),
    ],
)
def test_flags_that_would_do_nothing(sft, folder, flags, message):
    file = folder / ("stories.json" if "--comlora_prompt" in flags else "my.json")
    fields = ["--dataset_text_field", "story"] if "--comlora_prompt" in flags else []
    with pytest.raises(SystemExit, match=f"error: {message}"):
        sft("--dataset_name", file, *fields, *flags)


def test_a_mixture(sft, folder, trainers, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    entry = f"  - path: json\n    data_files: {folder / 'my.json'}\n"
    recipe.write_text(f"datasets:\n{entry}{entry}test_split_size: 0.2\neval_strategy: steps\neval_steps: 1\n")
    sft("--config", recipe)
    assert (len(trainers[-1].train_dataset), len(trainers[-1].eval_dataset)) == (32, 8)
    with pytest.raises(SystemExit, match="--dataset_name does nothing with a mixture"):
        sft("--config", recipe, "--dataset_name", "demo", "--comlora_overwrite_winner")


def test_the_demos_tournament_has_settings_of_its_own(script, tmp_path):
    """They come with the short way alone, and flags and --config win."""

    def parsed(*argv):
        return script.parse_arguments(list(argv))[1]

    own = yaml.safe_load(demo_recipe_path().read_text())["tournament"]
    plain, short = parsed("--comlora_k", "2"), parsed("--comlora_tournament")
    assert plain.comlora_rungs is None and plain.comlora_rows == "all" and plain.comlora_winner_by == "selector"
    assert {name: getattr(short, name) for name in own} == own and short.comlora_k == 4
    assert parsed("--comlora_tournament", "--learning_rate", "1e-3").comlora_rungs == own["comlora_rungs"]
    # with a part of one's own the others are the package's
    assert parsed("--comlora_tournament", "--comlora_k", "6").comlora_rungs == default_rungs(6)
    assert parsed("--comlora_tournament", "--comlora_rows", "shared").comlora_rungs == default_rungs(4)
    assert parsed("--comlora_tournament", "false").comlora_rungs is None
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("comlora_tournament: true\nmax_steps: 90\n")
    assert parsed("--config", str(recipe)).comlora_rungs == own["comlora_rungs"]
    recipe.write_text("comlora_tournament: true\ncomlora_rungs: 0.5:1\n")
    assert parsed("--config", str(recipe)).comlora_rungs == "0.5:1"
