"""Where a run starts: from a name, from an adapter, from the branches of another run."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import difference, make_arguments, make_dataset, make_lora, make_model, make_tokenizer, parameters
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoProcessor
from trl import SFTConfig, SFTTrainer

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.training.initial_adapter import START_NOISE
from recipes import make_chat_tokenizer

IDS = torch.arange(3, 21).view(2, 9)
SGD = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3}
ALONE = {"comlora_k": 1, "comlora_selector": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model and its tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """A winner trained on that base."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = start(str(base), folder, lora=make_lora(use_rslora=True))
    trainer.train()
    return Path(trainer.args.winner_dir)


def start(model: object, folder: Path, lora: object = None, **options: object) -> ComLoRASFTTrainer:
    given = {"train_dataset": make_dataset(), "eval_dataset": make_dataset(5)}
    if not isinstance(model, str):
        given["processing_class"] = make_tokenizer()
    config = ComLoRAConfig(**make_arguments(folder / "out", **SGD | options))
    return ComLoRASFTTrainer(model, config, peft_config=lora, **given)


def load(base: Path, adapter: Path, trainable: bool = False) -> PeftModel:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(plain, adapter, is_trainable=trainable)


def test_one_branch_from_an_adapter_is_trl_going_on_with_it(base, adapter, tmp_path):
    given = {"train_dataset": make_dataset(), "processing_class": make_tokenizer()}
    trl = SFTTrainer(
        load(base, adapter, trainable=True), SFTConfig(**make_arguments(tmp_path / "trl", **SGD)), **given
    )
    trl.train()
    ours = start(load(base, adapter), tmp_path, **ALONE)
    ours.train()
    theirs, own = ([e["loss"] for e in run.state.log_history if "loss" in e] for run in (trl, ours))
    assert own == pytest.approx(theirs, abs=1e-6)
    weights = {n.replace("default", "branch_0"): p for n, p in trl.model.named_parameters() if p.requires_grad}
    assert difference(weights, parameters(ours)) < 1e-6


def test_branches_from_an_adapters_folder(base, adapter, tmp_path):
    trainer = start(str(adapter), tmp_path)
    assert trainer.processing_class.eos_token == "</s>"
    model = trainer.comlora_model.eval()
    expected = load(base, adapter).eval()(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)
    state = {n: p for n, p in model.named_parameters() if ".branch_" in n}
    for name, weight in state.items():
        moved = ((state[name.replace("branch_0", "branch_1")] - weight).std() / weight.std()).item()
        assert moved == (pytest.approx(START_NOISE, rel=0.4) if "lora_A.branch_0" in name else 0)
    trainer.train()
    again = load(base, Path(trainer.args.winner_dir)).eval()
    torch.testing.assert_close(model.eval()(input_ids=IDS).logits, again(input_ids=IDS).logits, rtol=0, atol=1e-6)
    assert again.peft_config["default"].use_rslora


def test_adapters_that_cannot_be_the_start(base, adapter, tmp_path):
    two = load(base, adapter)
    two.add_adapter("other", make_lora())
    with pytest.raises(ValueError, match="has the adapters default, other, and the branches start from one"):
        start(two, tmp_path)
    with pytest.raises(ValueError, match="asks for r=2, but the adapter to start from has 4"):
        start(str(adapter), tmp_path, lora=make_lora(r=2, use_rslora=True))
    start(str(adapter), tmp_path, lora=make_lora(use_rslora=True, lora_dropout=0.1))  # the same shape
    with pytest.raises(ValueError, match="loaded with an adapter by transformers itself"):
        start(AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.float32), tmp_path)
    biased = get_peft_model(make_model(), make_lora(bias="all"))
    with pytest.raises(ValueError, match="leave bias out"):
        start(biased, tmp_path)


def test_branches_of_another_trainer(tmp_path):
    first = start(make_model(), tmp_path, make_lora(), comlora_k=3)
    first.train()
    model = first.model
    model.zero_branch(1)  # as a branch that diverges is left
    with pytest.raises(ValueError, match="has competing branches already, with comlora_k 3, but 2 is asked for"):
        start(model, tmp_path / "b", comlora_k=2)
    with pytest.raises(ValueError, match="with the selector SelectorSettings.*, but None is asked for"):
        start(model, tmp_path / "b", comlora_k=3, comlora_selector=False)
    with pytest.raises(ValueError, match="asks for r=8, but the adapter to start from has 4"):
        start(model, tmp_path / "b", make_lora(r=8), comlora_k=3)
    second = start(model, tmp_path / "b", make_lora(), comlora_k=3, comlora_noise=0.5)
    assert second.competition.settings.noise == 0.5
    state = second.competition.state
    assert (sum(state.wins), state.disqualified, state.selection) == (0, {}, None)
    # A new competition, in which the branch that was out begins again
    assert all(bool(p.any()) for n, p in model.named_parameters() if "lora_A.branch_1" in n)
    second.train()
    state = second.competition.state
    assert sum(state.wins) == 3 and not state.disqualified


@pytest.mark.parametrize("k", [1, 3])
def test_a_base_that_has_branches_in_it(k, tmp_path):
    model = make_model()
    first = start(model, tmp_path, make_lora(), comlora_k=2)
    with pytest.raises(ValueError, match="the base of another trainer's branches, which are still in it: call unload"):
        start(model, tmp_path / "b", make_lora(), comlora_k=k)
    start(first.model.unload(), tmp_path / "b", make_lora(), comlora_k=k)


def test_names_keep_their_options_and_the_tokenizer_its_revision(base, tmp_path, monkeypatch):
    asked, original = [], AutoProcessor.from_pretrained

    def from_pretrained(name, **kwargs):
        asked.append((name, kwargs.get("revision")))
        return original(name, **kwargs)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
    options = {"revision": "v2", "dtype": "float32"}
    trainer = start(str(base), tmp_path, model_init_kwargs=options)
    assert trainer.args.model_init_kwargs is options and options == {"revision": "v2", "dtype": "float32"}
    assert asked == [(str(base), "v2")]


def test_chat_template_of_another_tokenizer(base, tmp_path):
    make_chat_tokenizer().save_pretrained(tmp_path / "chat")
    trainer = start(str(base), tmp_path, chat_template_path=str(tmp_path / "chat"))
    assert trainer.processing_class.chat_template == make_chat_tokenizer().chat_template
    assert trainer.args.chat_template_path == str(tmp_path / "chat")


@pytest.mark.parametrize(
    ("writes", "refused"),
    [("", False), ("<|turn|>", True), ("{{ '<|' + 'turn' + '|>' }}", True), ("{{ eos_token }}", True)],
)
def test_only_tokens_that_the_other_template_writes_have_to_be_known(base, tmp_path, writes, refused):
    tokenizer = make_chat_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved|>", "<|turn|>"]})
    if "eos_token" in writes:
        tokenizer.eos_token = "<|turn|>"
    tokenizer.chat_template = writes + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "more")
    if refused:
        with pytest.raises(ValueError, match=r"tokens the model does not know \(<\|turn\|>\)"):
            start(str(base), tmp_path, chat_template_path=str(tmp_path / "more"))
    else:
        trainer = start(str(base), tmp_path, chat_template_path=str(tmp_path / "more"))
        assert trainer.processing_class.chat_template == tokenizer.chat_template
        assert "<|reserved|>" not in trainer.processing_class.get_vocab()


def test_a_model_whose_adapter_became_branches_saves_the_winner(tmp_path):
    model = get_peft_model(make_model(), make_lora())
    start(model, tmp_path, comlora_k=3).train()
    model.save_pretrained(tmp_path / "mine")
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "mine").eval()
    expected = PeftModel.from_pretrained(make_model(), tmp_path / "out" / "winner").eval()
    with torch.no_grad():
        logits = loaded(input_ids=IDS).logits
        assert torch.equal(logits, expected(input_ids=IDS).logits)
        assert torch.equal(logits, model.eval()(input_ids=IDS).logits)
        assert not torch.allclose(logits, make_model().eval()(input_ids=IDS).logits)


def test_reentrant_checkpointing_gives_way_in_a_line(tmp_path, caplog):
    asked = {"use_reentrant": True}
    with caplog.at_level(logging.WARNING):
        trainer = start(make_model(), tmp_path, make_lora(), gradient_checkpointing_kwargs=asked)
    assert "the non-reentrant kind runs" in caplog.text and asked == {"use_reentrant": True}
    assert trainer.args.activation_checkpointing_kwargs == {"use_reentrant": False}


def test_a_newer_trl_is_named_in_a_line(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("trl.__version__", "1.17.0")
    with caplog.at_level(logging.WARNING):
        start(make_model(), tmp_path, make_lora()).train()
    assert caplog.text.count("trl 1.17.0 is newer than 1.16") == 1
    monkeypatch.setattr("trl.__version__", "1.16.3")
    caplog.clear()
    start(make_model(), tmp_path / "b", make_lora())
    assert "newer than" not in caplog.text
