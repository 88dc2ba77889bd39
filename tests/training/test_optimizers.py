"""What is measured is what is exported, and the rates that a run reports are those it trains with."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import RATES, TOURNAMENT, difference, make_arguments, make_dataset, make_lora, make_model, make_tokenizer
from conftest import parameters as trained
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from trl import SFTConfig, SFTTrainer

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.training.export import export_checkpoint
from comlora_trl.training.optimizers import enter_evaluation_weights, evaluation_weights, group_by_owner

FREE = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "learning_rate": 3e-2}
TWO = {"comlora_k": 2, "comlora_selector": False}


@torch.no_grad()
def validation_nll(model: nn.Module, rows: int = 13) -> float:
    """Mean NLL of the completions of the validation set, row by row, with nothing of the project."""
    model.eval()
    tokenizer, total, count = make_tokenizer(), 0.0, 0
    for row in make_dataset(rows):
        prompt = tokenizer(row["prompt"]).input_ids
        ids = prompt + tokenizer(row["completion"]).input_ids + [tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        total += nn.functional.cross_entropy(logits, torch.tensor(ids[len(prompt) :]), reduction="sum").item()
        count += len(ids) - len(prompt)
    return total / count


def reloaded_nll(folder: Path) -> float:
    return validation_nll(PeftModel.from_pretrained(make_model().double(), folder))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# ---- Evaluation weights ----


@pytest.fixture
def free() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A schedule-free optimizer of two groups after three steps, in training mode."""
    schedulefree = pytest.importorskip("schedulefree")
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
    optimizer = schedulefree.AdamWScheduleFree(groups, lr=0.1)
    optimizer.train()
    for _ in range(3):
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_the_training_iterate_comes_back_bit_by_bit(free):
    model, optimizer = free
    iterate = [p.detach().clone() for p in model.parameters()]
    averages = [p + (1 - 1 / 0.9) * (optimizer.state[p]["z"] - p) for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), evaluation_weights(optimizer, model):
        for parameter, average, before in zip(model.parameters(), averages, iterate, strict=True):
            torch.testing.assert_close(parameter, average, rtol=0, atol=1e-6)
            assert not torch.equal(parameter, before)
        raise ZeroDivisionError
    assert all(map(torch.equal, model.parameters(), iterate))
    assert all(group["train_mode"] for group in optimizer.param_groups)


def test_training_mode_comes_back_where_no_weight_moves():
    """As in a warm-up's first step, at a rate of 0."""
    schedulefree = pytest.importorskip("schedulefree")
    model = nn.Linear(7, 5)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.0)
    optimizer.train()
    model(torch.randn(4, 7)).sum().backward()
    optimizer.step()
    with evaluation_weights(optimizer, model):
        assert not optimizer.param_groups[0]["train_mode"]
    optimizer.step()


def test_evaluation_weights_that_are_there_stay(free):
    model, optimizer = free
    enter_evaluation_weights(optimizer, model)
    there = [p.detach().clone() for p in model.parameters()]
    with evaluation_weights(optimizer, model):
        assert all(map(torch.equal, model.parameters(), there))
    assert all(map(torch.equal, model.parameters(), there))
    assert not any(group["train_mode"] for group in optimizer.param_groups)
    for other in (None, torch.optim.SGD(model.parameters(), lr=1.0)):
        with evaluation_weights(other, model):
            assert all(map(torch.equal, model.parameters(), there))


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "schedule_free_sgd"])
@pytest.mark.parametrize("evaluated", [True, False], ids=["eval_steps", "at the end"])
def test_the_table_the_winner_and_the_model_are_one(train, optim, evaluated):
    pytest.importorskip("schedulefree")
    options = {"eval_strategy": "steps", "eval_steps": 4} if evaluated else {}
    trainer = train(**{**FREE, "optim": optim}, **TWO, **options, max_steps=12)
    winner = trainer.determine_winner()
    table = json.loads((Path(trainer.args.winner_dir) / "competition.json").read_text())["branches"]
    here = validation_nll(trainer.model)
    assert table[winner]["validation_nll"] == pytest.approx(here, abs=2e-6)
    assert reloaded_nll(Path(trainer.args.winner_dir)) == pytest.approx(here, abs=1e-6)
    trainer.optimizer.train()
    iterate = validation_nll(trainer.model)
    assert abs(iterate - here) > 1e-4
    for branch in range(2):
        folder = Path(trainer.args.output_dir) / f"b{branch}"
        trainer.export_branch(branch, folder, overwrite=False)
        assert reloaded_nll(folder) == pytest.approx(table[branch]["validation_nll"], abs=2e-6)
    trainer.save_model(str(Path(trainer.args.output_dir) / "saved"))
    assert reloaded_nll(Path(trainer.args.output_dir) / "saved") == pytest.approx(here, abs=1e-6)
    assert validation_nll(trainer.model) == iterate


def test_retired_branches_are_measured_weights_and_the_others_train_on(train):
    """A rung changes nothing in the branches that go on, to the last bit."""
    pytest.importorskip("schedulefree")
    kept = []

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            optimizer.train()
            if state.global_step == 4:
                own = model.named_parameters()
                kept.append({name: p.detach().clone() for name, p in own if p.requires_grad})

    settings = {**TOURNAMENT, **FREE, "max_steps": 8, "trainer": {"callbacks": [Keep()]}}
    shrunk = train(comlora_rungs="0.5:2", **settings)
    train(**settings)
    assert len(kept[0]) < len(kept[1])
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
    [rung] = shrunk.competition.state.rungs
    for branch in rung["retired"]:
        folder = Path(shrunk.args.output_dir) / "retired" / f"branch_{branch}"
        assert reloaded_nll(folder) == pytest.approx(rung["validation_nll"][branch], abs=2e-6)


@pytest.mark.parametrize("evaluated", [True, False], ids=["evaluated", "saved alone"])
def test_one_branch_is_trls_checkpoint_and_resumes_bit_by_bit(train, evaluated, tmp_path):
    pytest.importorskip("schedulefree")
    options = {**FREE, "save_strategy": "steps", "save_steps": 3, "max_steps": 9}
    options |= {"eval_strategy": "steps", "eval_steps": 3} if evaluated else {}
    own = train(comlora_k=1, comlora_selector=False, **options)
    config = SFTConfig(**make_arguments(tmp_path / "trl", **options))
    given = {"train_dataset": make_dataset(), "eval_dataset": make_dataset(13), "processing_class": make_tokenizer()}
    theirs = SFTTrainer(make_model().double(), config, peft_config=make_lora(), **given)
    theirs.train()
    theirs.optimizer.eval()
    for step in (3, 6, 9):
        checkpoints = [Path(folder) / f"checkpoint-{step}" for folder in (own.args.output_dir, config.output_dir)]
        found, expected = map(weights, checkpoints)
        if not evaluated:  # TRL's is the training iterate, y; its average is x = y + (1 - 1/0.9) (z - y)
            state = torch.load(checkpoints[1] / "optimizer.pt")["state"]
            names = [name.replace(".default", "") for name, p in theirs.model.named_parameters() if p.requires_grad]
            z = {name: state[index]["z"] for index, name in enumerate(names)}
            expected = {name: y + (1 - 1 / 0.9) * (z[name] - y) for name, y in expected.items()}
        assert difference(found, expected) < 1e-6
        export_checkpoint(checkpoints[0], 0, tmp_path / f"exported-{step}")
        assert difference(weights(tmp_path / f"exported-{step}"), found) == 0
    last = {name.replace(".default.", ".branch_0."): p for name, p in theirs.model.named_parameters()}
    assert difference(trained(own), {name: p for name, p in last.items() if p.requires_grad}) < 1e-6
    for step in (3, 6):
        resumed = train(comlora_k=1, comlora_selector=False, start=False, **options)
        resumed.train(resume_from_checkpoint=str(Path(own.args.output_dir) / f"checkpoint-{step}"))
        assert difference(trained(resumed), trained(own)) == 0
        assert vars(resumed.competition.state) == vars(own.competition.state)


def test_a_tournament_resumes_bit_by_bit(train):
    pytest.importorskip("schedulefree")
    settings = {**TOURNAMENT, **FREE, "comlora_rungs": "0.3:3,0.6:2", "save_strategy": "steps", "save_steps": 2}
    whole = train(**settings)
    for step in (2, 4, 8):
        resumed = train(start=False, **settings)
        resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / f"checkpoint-{step}"))
        assert difference(trained(resumed), trained(whole)) == 0
        assert vars(resumed.competition.state) == vars(whole.competition.state)


def test_the_best_checkpoint_is_exported_as_it_was_measured(train):
    """Also where the last steps were not evaluated, so that the optimizer is in training mode at the end."""
    pytest.importorskip("schedulefree")

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                for parameter in model.trainable_parameters():
                    parameter.data.mul_(20)

    both = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    given = {"load_best_model_at_end": True, "max_steps": 10, "trainer": {"callbacks": [Spoil()]}}
    trainer = train(**FREE, **TWO, **both, **given)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-4"
    winner = trainer.determine_winner()
    assert difference(weights(Path(trainer.args.winner_dir)), weights(best / f"branch_{winner}")) == 0
    measured = trainer.competition.state.selection["validation_nll"][winner]
    assert reloaded_nll(Path(trainer.args.winner_dir)) == pytest.approx(measured, abs=2e-6)
    assert validation_nll(trainer.model) == pytest.approx(measured, abs=2e-6)


def test_a_disqualified_branch_stays_the_base(train):
    pytest.importorskip("schedulefree")

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.branch_parameters(1)[-1].data.fill_(math.inf)

    options = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = train(**FREE, **TWO, **options, trainer={"callbacks": [Poison()]})
    assert trainer.competition.state.disqualified == {1: 4}
    folder = Path(trainer.args.output_dir) / "diverged"
    trainer.export_branch(1, folder, overwrite=False)
    assert all(value.eq(0).all() for value in weights(folder).values())


# ---- Rates ----


def record_of(trainer) -> dict:
    return json.loads((Path(trainer.args.winner_dir) / "competition.json").read_text())


def subclass(make):
    """A trainer whose `create_optimizer` is the user's own."""

    class Own(ComLoRASFTTrainer):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = make(self.comlora_model)
            return self.optimizer

    return Own


def begin(cls, folder: Path, **args) -> ComLoRASFTTrainer:
    trainer = args.pop("trainer", {})
    given = {"train_dataset": make_dataset(), "eval_dataset": make_dataset(13), "processing_class": make_tokenizer()}
    given |= {"peft_config": make_lora()} | trainer
    config = ComLoRAConfig(**make_arguments(folder, **{"max_steps": 4, **args}))
    return cls(make_model().double(), config, **given)


def one_rate(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.25)


def loraplus(model: nn.Module) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)


def layerwise(model: nn.Module) -> torch.optim.Optimizer:
    own = {p: torch.optim.AdamW([p], lr=1e-3) for p in model.parameters() if p.requires_grad}
    return LayerWiseDummyOptimizer(own, lr=1e-3)


@pytest.mark.parametrize("make", [one_rate, loraplus, layerwise])
@pytest.mark.parametrize(
    "asked",
    [{"comlora_branch_learning_rates": [1e-4, 1e-2]}, {"comlora_tournament": True, "comlora_rungs": "0.5:1"}],
    ids=["rates", "tournament"],
)
def test_rates_that_the_groups_do_not_hold_are_refused(make, asked, tmp_path):
    trainer = begin(subclass(make), tmp_path, **TWO, **asked)
    before = trained(trainer)
    with pytest.raises(ValueError) as error:
        trainer.train()
    text = str(error.value)
    assert text.startswith("comlora_branch_learning_rates=") and "\n" not in text
    assert ("(of comlora_tournament)" in text) == ("comlora_tournament" in asked)
    assert f"{type(make(trainer.model)).__name__} have others (branch_0 0.001" in text and "leave the option" in text
    assert difference(trained(trainer), before) == 0


def test_a_rate_of_the_selector_is_refused_too(tmp_path):
    trainer = begin(subclass(one_rate), tmp_path, comlora_k=2, comlora_selector_learning_rate=1e-2)
    with pytest.raises(ValueError, match=r"comlora_selector_learning_rate is not possible: .*selector 0\.001"):
        trainer.train()


def test_an_optimizer_set_on_the_trainer(tmp_path):
    trainer = begin(ComLoRASFTTrainer, tmp_path, **TWO, comlora_branch_learning_rates=[1e-4, 1e-2])
    trainer.optimizer = loraplus(trainer.model)
    with pytest.raises(ValueError, match=r"others \(branch_0 0\.001/0\.016; branch_1 0\.001/0\.016\)"):
        trainer.train()


def test_rates_of_the_users_own_groups_are_told(tmp_path, capsys):
    """Nothing of ours asks for them."""
    rates = [2e-3, 3e-2]

    def make(model):
        groups = [{"params": model.branch_parameters(k), "lr": rate} for k, rate in enumerate(rates)]
        return torch.optim.SGD(groups, weight_decay=0.5)

    trainer = begin(subclass(make), tmp_path, **TWO, comlora_rungs="0.75:1", lr_scheduler_type="linear")
    trainer.train()
    assert [branch["learning_rate"] for branch in record_of(trainer)["branches"]] == rates
    out = capsys.readouterr().out
    assert "Tournament: rates 0.002, 0.03; " in out and "0.002" in out.split("Rung at step")[1]
    first, second, *_ = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [first[f"comlora/learning_rate_{k}"] for k in range(2)] == pytest.approx(rates)
    assert [second[f"comlora/learning_rate_{k}"] for k in range(2)] == pytest.approx([r * 0.75 for r in rates])
    told = json.loads((Path(trainer.args.winner_dir) / "training.json").read_text())["settings"]
    assert told["comlora_branch_learning_rates"] == rates
    assert (told["optim"], told["weight_decay"]) == ("torch.optim.sgd.SGD", 0.5)


def test_a_rung_and_the_record_tell_the_users_one_rate(tmp_path, capsys):
    trainer = begin(subclass(one_rate), tmp_path, **TWO, comlora_rungs="0.5:1")
    trainer.train()
    rung = capsys.readouterr().out.split("Rung at step")[1]
    assert rung.count("0.001") == 2 and "0.01 " not in rung
    assert [branch["learning_rate"] for branch in record_of(trainer)["branches"]] == [None, None]
    told = json.loads((Path(trainer.args.winner_dir) / "training.json").read_text())["settings"]
    assert (told["learning_rate"], told["weight_decay"]) == (1e-3, 0.25)


def test_groups_made_here_keep_loraplus_ratio(tmp_path, capsys):
    """LoRA+ as PEFT groups it, through the class that the Trainer makes its optimizer of."""

    class Plus(ComLoRASFTTrainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            groups = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16).param_groups
            return torch.optim.AdamW, {"params": groups, "lr": 1e-2}

    trainer = begin(Plus, tmp_path, **TWO, comlora_branch_learning_rates=[1e-3, 2e-3])
    trainer.train()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            found.setdefault((f"branch_{'branch_1' in name:d}", name.split(".")[-3]), set()).add(group["initial_lr"])
    rates = {
        (f"branch_{k}", kind): rate
        for k, a in enumerate([1e-3, 2e-3])
        for kind, rate in (("lora_A", a), ("lora_B", 16 * a))
    }
    assert found.keys() == rates.keys()
    assert all(list(found[key]) == pytest.approx([rate]) for key, rate in rates.items())
    assert [branch["learning_rate"] for branch in record_of(trainer)["branches"]] == [1e-3, 2e-3]
    assert "rates 0.001/0.016, 0.002/0.032" in capsys.readouterr().out


def test_the_class_of_an_optimizer_gets_the_rates_that_are_asked_for(tmp_path):
    options = {"trainer": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9})}}
    trainer = begin(ComLoRASFTTrainer, tmp_path, **TWO, comlora_branch_learning_rates=[1e-3, 2e-3], **options)
    trainer.train()
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-3, 2e-3}
    assert all(group["momentum"] == 0.9 for group in trainer.optimizer.param_groups)


def test_groups_of_rates_that_no_branch_rate_stands_for():
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.2}])
    owners = {id(one): "branch_0", id(two): "branch_1"}
    with pytest.raises(ValueError, match=r"the rates 0\.1, 0\.2, none of them learning_rate=0\.3"):
        group_by_owner(optimizer, owners, {"branch_0": 1.0, "branch_1": 2.0}, 0.3)


def without(branch: int):
    return lambda model: torch.optim.SGD(
        [p for n, p in model.named_parameters() if p.requires_grad and f"branch_{branch}" not in n], lr=0.1
    )


def of_the_base(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if not p.requires_grad], lr=0.1)


def no_selector(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for n, p in model.named_parameters() if "lora" in n], lr=0.1)


MISSED = {
    "one branch": (without(1), TWO, "does not train branch_1:"),
    "all": (of_the_base, TWO, "does not train branch_0, branch_1:"),
    "the selector": (no_selector, {"comlora_k": 2}, "does not train selector:"),
}


@pytest.mark.parametrize("make, options, text", MISSED.values(), ids=MISSED)
def test_an_optimizer_that_misses_a_branch(make, options, text, tmp_path):
    with pytest.raises(ValueError, match=text) as error:
        begin(subclass(make), tmp_path, **options).train()
    assert "\n" not in str(error.value)


def test_an_optimizer_made_before_the_branches(tmp_path):
    model = make_model().double()
    config = ComLoRAConfig(**make_arguments(tmp_path, **TWO))
    given = {"train_dataset": make_dataset(), "processing_class": make_tokenizer(), "peft_config": make_lora()}
    optimizers = (torch.optim.AdamW(model.parameters(), lr=1e-3), None)
    with pytest.raises(ValueError, match="the optimizer AdamW does not train branch_0, branch_1: its groups lack"):
        ComLoRASFTTrainer(model, config, optimizers=optimizers, **given).train()


def test_parts_that_no_branch_trains_are_the_users_choice(tmp_path):
    def make(model):
        return torch.optim.SGD([p for n, p in model.named_parameters() if "lora_B" in n], lr=0.1)

    trainer = begin(subclass(make), tmp_path, **TWO)
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_checkpoint_goes_on_at_its_own_rates(train):
    settings = {**TOURNAMENT, "save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole = train(**settings)
    other = train(start=False, **{**settings, "comlora_branch_learning_rates": [2 * rate for rate in RATES]})
    with pytest.raises(ValueError, match=r"the checkpoint's optimizer goes on at its own rates \(branch_0 0\.005;"):
        other.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-4"))


def test_a_given_optimizer_cant_train_new_branches(train):
    trainer = train(start=False, **TWO, comlora_rungs="0.5:1", max_steps=4)
    trainer.optimizer = one_rate(trainer.model)
    trainer.train()
    with pytest.raises(ValueError, match="the optimizer that was given knows nothing of new adapters"):
        trainer.train()


def test_a_search_names_the_tournament(train):
    trainer = train(start=False, **TWO)
    with pytest.raises(NotImplementedError, match="set comlora_tournament=True") as error:
        trainer.hyperparameter_search(n_trials=1)
    assert "\n" not in str(error.value) and "model_init" in str(error.value)
