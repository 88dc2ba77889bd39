"""Branches of a preference trainer train as TRL's own trainers do, each alone."""

import re
from pathlib import Path

import pytest
import torch
from conftest import difference as largest_difference
from conftest import exhaustive, make_lora, make_model, make_tokenizer
from datasets import load_dataset
from kinds import DPO, KINDS, KTO, REWARD, difference, logged, make_classifier, name_of, perturb, start_from
from peft import PeftModel

from comlora_trl.training.data_checks import check_precomputed

RATES, BETAS = [0.1, 0.3, 0.5], [0.1, 0.3, 0.05]
SGD = {"optim": "sgd", "lr_scheduler_type": "constant"}
CASES = [(kind, options) for kind in KINDS for options in kind.losses]
FIRST = [(kind, options) for kind, options in CASES if options in kind.losses[:4]]  # of each trainer


def names_of(case: tuple) -> str:
    return "-".join(map(names, case))


def names(case: object) -> str:
    return name_of(case) if isinstance(case, dict) else str(case)


@pytest.mark.parametrize(
    "kind, options",
    [pytest.param(*case, marks=[] if case in FIRST else pytest.mark.exhaustive, id=names_of(case)) for case in CASES],
)
def test_one_branch_is_trls_trainer(kind, options, tmp_path):
    """Losses, every metric, and weights, over ten steps of AdamW."""
    options = {"learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 5, **options}
    ours = kind.run(tmp_path / "ours", given={"model": kind.single()}, comlora_k=1, **options)
    trls = kind.run(tmp_path / "trl", trl=True, given={"model": kind.single()}, **options)
    assert difference(ours, 0, trls) == 0
    perturb(ours)
    start_from(trls, ours, 0)
    ours.train()
    trls.train()
    assert difference(ours, 0, trls) < 1e-5
    compared = 0
    found = [
        entry for entry in ours.state.log_history if not all("comlora" in n for n in entry.keys() - {"epoch", "step"})
    ]
    for entry, expected in zip(found, trls.state.log_history, strict=True):
        for name in expected:
            if not re.search("runtime|per_second", name):
                assert entry[name] == pytest.approx(expected[name], abs=1e-5, rel=1e-5), (expected["step"], name)
                compared += 1
    assert compared > 100


@pytest.mark.parametrize("kind, tag", zip(KINDS, ("dpo", "reward-trainer", "kto"), strict=True), ids=names)
def test_the_card_names_the_trainer_and_its_loss(kind, tag, tmp_path):
    trainer = kind.run(tmp_path, comlora_k=2, max_steps=1)
    trainer.train()
    card = (Path(trainer.args.winner_dir) / "README.md").read_text()
    assert f"- {tag}\n" in card and "- sft\n" not in card
    assert ("| `beta` |" in card) is (kind is not REWARD)


BETA = [kind for kind in KINDS if kind.name != "reward"]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"comlora_branch_chunk": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
        *exhaustive({"gradient_checkpointing": False}, {"comlora_branch_chunk": 1}, {"max_grad_norm": 0.05}),
    ],
    ids=names,
)
@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_branches_are_trainers_of_their_own(kind, more, tmp_path):
    """Rows "all", rates and betas of the branches' own: K = 3 equals three of TRL's runs."""
    betas = {"comlora_branch_betas": BETAS} if kind in BETA else {}
    ours = kind.run(tmp_path / "ours", comlora_k=3, comlora_branch_learning_rates=RATES, **betas, **SGD, **more)
    perturb(ours)
    options = {name: value for name, value in more.items() if not name.startswith("comlora")}
    trls = []
    for branch, (rate, beta) in enumerate(zip(RATES, BETAS, strict=True)):
        own = {"beta": beta} if betas else {}
        trls.append(kind.run(tmp_path / f"{branch}", trl=True, learning_rate=rate, **own, **SGD, **options))
        start_from(trls[-1], ours, branch)
    ours.train()
    for branch, trl in enumerate(trls):
        trl.train()
        assert difference(ours, branch, trl) < 1e-5
        assert logged(ours, f"comlora/loss_{branch}") == pytest.approx(logged(trl, "loss"), abs=1e-5)
        accuracy = {"dpo": "rewards/accuracies", "reward": "accuracy"}.get(kind.name)
        if accuracy:
            assert logged(ours, f"comlora/reward_accuracy_{branch}") == pytest.approx(logged(trl, accuracy), abs=1e-5)
    leader = 0  # before there is a selection
    for name in ("num_tokens", "entropy", "rewards/chosen", "rewards/margins", "margin", "mean_reward"):
        if name in trls[leader].state.log_history[0]:
            assert logged(ours, name) == pytest.approx(logged(trls[leader], name), abs=1e-5), name
    assert sum(ours.competition.state.wins) == (0 if betas else 10)


@pytest.mark.parametrize("chunk", [1, *exhaustive(None)])
@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_shared_rows_are_separate_runs_on_the_rows_dealt(kind, chunk, tmp_path):
    """A pair goes to one branch whole, and its loss is TRL's mean over the branch's own pairs."""
    more = {} if chunk is None else {"comlora_branch_chunk": chunk}
    rows = {"comlora_k": 3, "comlora_rows": "shared", "comlora_branch_learning_rates": RATES}
    ours = kind.run(tmp_path / "ours", **rows, **SGD, **more)
    perturb(ours)
    trls = []
    for branch, rate in enumerate(RATES):
        dealt = [t * 6 + place for t in range(10) for place in range(6) if (place + t) % 3 == branch]
        options = {"learning_rate": rate, "per_device_train_batch_size": 2} | SGD
        trls.append(kind.run(tmp_path / f"{branch}", trl=True, **options))
        trls[-1].train_dataset = ours.train_dataset.select(dealt)  # prepared already: KTO's rows with their KL rows
        start_from(trls[-1], ours, branch)
    ours.train()
    for branch, trl in enumerate(trls):
        trl.train()
        assert difference(ours, branch, trl) < 1e-5
        assert logged(ours, f"comlora/loss_{branch}") == pytest.approx(logged(trl, "loss"), abs=1e-5)
    assert logged(ours, "num_tokens")[-1] == sum(logged(trl, "num_tokens")[-1] for trl in trls)
    assert ours.competition.state.row_passes == 60


@pytest.mark.parametrize("rows", [*exhaustive("all"), "shared"])
@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_the_cut_into_micro_batches_changes_nothing(kind, rows, tmp_path):
    """Shares of a branch are unequal, and the last step of an epoch is not full."""
    options = {"comlora_k": 3, "comlora_rows": rows, "comlora_branch_learning_rates": RATES, "max_steps": 6}
    options |= SGD | kind.of_any_cut
    runs = []
    for size, cut in ((8, 1), (4, 2), (2, 4)):
        data = {"train_dataset": kind.data(13)}
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": cut}
        trainer = kind.run(tmp_path / f"{size}", given=data, **options)
        perturb(trainer)
        trainer.train()
        runs.append(trainer)
    whole = [p.detach() for p in runs[0].comlora_model.trainable_parameters()]
    for trainer in runs[1:]:
        cut = [p.detach() for p in trainer.comlora_model.trainable_parameters()]
        assert max((one - other).abs().max().item() for one, other in zip(whole, cut, strict=True)) < 1e-5
        for branch in range(3):
            name = f"comlora/loss_{branch}"
            assert logged(trainer, name) == pytest.approx(logged(runs[0], name), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_a_resumed_run_ends_bitwise_where_the_whole_one_does(kind, tmp_path):
    options = {"comlora_tournament": True, "comlora_rungs": "0.3:2,0.7:1", "learning_rate": 1e-2, "save_steps": 4}
    options |= {"save_strategy": "steps", "comlora_overwrite_winner": True, **kind.of_any_cut}
    whole = kind.run(tmp_path / "run", **options)
    whole.train()
    resumed = kind.run(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    first = {name: p for name, p in whole.comlora_model.named_parameters() if p.requires_grad}
    second = dict(resumed.comlora_model.named_parameters())
    assert first and all(torch.equal(parameter, second[name]) for name, parameter in first.items())
    assert whole.competition.state == resumed.competition.state
    assert whole.competition_summary()["branches"] == resumed.competition_summary()["branches"]


@pytest.mark.parametrize(
    "dtype, bf16", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)], ids=str
)
def test_a_reward_model_on_a_half_precision_base_trains_as_trls(dtype, bf16, tmp_path):
    """Adapters are float32, the head has the base's precision, and the error against float32 is that of TRL's run."""
    options = {"bf16": bf16, "gradient_checkpointing": False, "learning_rate": 0.02, **SGD}
    half = lambda: {"model": make_classifier().to(dtype)}
    ours = REWARD.run(tmp_path / "ours", given=half(), comlora_k=2, **options)
    trl = REWARD.run(tmp_path / "trl", trl=True, given=half(), **options)
    whole = {"model": make_classifier().to(dtype).float()}
    exact = REWARD.run(tmp_path / "exact", trl=True, given=whole, **options | {"bf16": False})
    expected = {name: parameter.dtype for name, parameter in trl.model.named_parameters()}
    assert set(expected.values()) == {dtype, torch.float32}
    for branch in range(2):
        found = {name.replace(f"branch_{branch}", "default"): p.dtype for name, p in ours.model.named_parameters()}
        assert expected.items() <= found.items()
    perturb(ours)
    branches = zip(*map(ours.comlora_model.branch_parameters, range(2)), strict=True)
    with torch.no_grad():
        for first, second in branches:
            second.copy_(first)
    for trainer in (trl, exact):
        start_from(trainer, ours, 0)
    start = {name: p.detach().clone() for name, p in exact.model.named_parameters() if p.requires_grad}
    for trainer in (ours, trl, exact):
        trainer.train()
    ends = [{n: p.detach().float() for n, p in one.model.named_parameters() if n in start} for one in (trl, exact)]
    theirs = largest_difference(*ends)
    assert largest_difference(start, ends[1]) > 10 * theirs
    for branch in range(2):
        assert difference(ours, branch, exact) < 1.5 * theirs


# ---- The reference ----


class Forwards:
    """Counts the base model's forwards in training, by whether the adapters were on."""

    def __init__(self, trainer) -> None:
        self.model, self.count = trainer.comlora_model, {True: 0, False: 0}
        self.model.get_base_model().model.register_forward_pre_hook(self.see)

    def see(self, *_: object) -> None:
        if self.model.training:
            self.count[self.model.is_switched_off] += 1


@pytest.mark.parametrize("rows", ["all", "shared"])
def test_the_reference_runs_once_for_all_branches(rows, tmp_path):
    trainer = DPO.run(tmp_path, comlora_k=3, comlora_rows=rows, gradient_checkpointing=False, max_steps=4)
    forwards = Forwards(trainer)
    trainer.train()
    assert forwards.count == {True: 4, False: 4}


@pytest.mark.parametrize("kind", BETA, ids=names)
def test_the_reference_of_a_validation_batch_runs_once_in_a_training(kind, tmp_path, monkeypatch):
    options = {"comlora_k": 3, "comlora_branch_learning_rates": [1e-3, 3e-3, 1e-2], "comlora_rungs": "0.3:2,0.6:1"}
    counts, ends = {}, {}
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(kind.ours, "keeps_references", False)
        trainer = kind.run(tmp_path / str(kept), gradient_checkpointing=False, max_steps=4, **options)
        calls, reference_of = [], trainer.reference_of

        def counted(inputs, trainer=trainer, calls=calls, reference_of=reference_of):
            calls.append(trainer.model.training)
            return reference_of(inputs)

        trainer.reference_of = counted
        trainer.train()
        counts[kept], ends[kept] = calls.count(False), trainer.competition.state
        assert calls.count(True) == 4
    assert counts[False] == 3 * counts[True] > 0  # two rungs and the last selection
    assert ends[True].rungs == ends[False].rungs and ends[True].selection == ends[False].selection
    assert trainer._references is None


def test_precomputed_references_need_no_pass(tmp_path):
    trainer = DPO.run(tmp_path, comlora_k=3, precompute_ref_log_probs=True, gradient_checkpointing=False, max_steps=4)
    forwards = Forwards(trainer)
    trainer.train()
    assert forwards.count == {True: 0, False: 4}


@pytest.mark.parametrize("kind", BETA, ids=names)
def test_references_of_data_in_memory_are_not_precomputed_by_two_processes(kind, tmp_path, monkeypatch):
    """TRL's own trainer ends in a FileNotFoundError then; data from a file can be."""
    kind.data().to_json(tmp_path / "data.json")
    stored = load_dataset("json", data_files=str(tmp_path / "data.json"), split="train", cache_dir=str(tmp_path))
    check_precomputed(stored, {"one": stored.select(range(4))}, 2)
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
    with pytest.raises(ValueError, match="not possible on 2 processes with train_dataset in memory.*load it from a"):
        kind.run(tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="not possible on 2 processes with eval_dataset in memory"):
        kind.run(tmp_path, given={"train_dataset": stored}, precompute_ref_log_probs=True)


@pytest.mark.parametrize("rows", ["all", "shared"])
def test_a_reference_model_of_its_own(rows, tmp_path):
    options = {"learning_rate": 0.3, **SGD}
    given = lambda: {"ref_model": make_model(seed=5)}
    ours = DPO.run(tmp_path / "ours", given=given(), comlora_k=1 if rows == "all" else 2, comlora_rows=rows, **options)
    perturb(ours)
    data = (
        {} if rows == "all" else {"train_dataset": DPO.data().select([i for i in range(60) if (i + i // 6) % 2 == 0])}
    )
    size = {} if rows == "all" else {"per_device_train_batch_size": 3}
    trls = DPO.run(tmp_path / "trl", trl=True, given=given() | data, **options, **size)
    start_from(trls, ours, 0)
    ours.train()
    trls.train()
    assert difference(ours, 0, trls) < 1e-5
    assert logged(ours, "rewards/chosen") == pytest.approx(logged(trls, "rewards/chosen"), abs=1e-4)


@pytest.mark.parametrize("precompute", [False, True])
def test_an_adapter_to_go_on_from_is_the_reference(precompute, tmp_path):
    from peft import get_peft_model

    def adapter():
        torch.manual_seed(11)
        model = get_peft_model(make_model(), make_lora(init_lora_weights=False))
        return {"model": model, "peft_config": None}

    options = {"learning_rate": 0.3, "precompute_ref_log_probs": precompute, **SGD}
    ours = DPO.run(tmp_path / "ours", given=adapter(), comlora_k=1, **options)
    trls = DPO.run(tmp_path / "trl", trl=True, given=adapter(), **options)
    assert difference(ours, 0, trls) == 0
    ours.train()
    trls.train()
    assert difference(ours, 0, trls) < 1e-5
    assert logged(ours, "rewards/chosen") == pytest.approx(logged(trls, "rewards/chosen"), abs=1e-5)
    assert logged(ours, "rewards/chosen")[0] == pytest.approx(0, abs=1e-6)


def test_an_adapter_to_go_on_from_with_several_branches(tmp_path):
    from peft import get_peft_model

    torch.manual_seed(11)
    model = get_peft_model(make_model(), make_lora(init_lora_weights=False))
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}
    options = {"comlora_tournament": True, "comlora_rungs": "0.3:2,0.7:1", "learning_rate": 1e-2}
    trainer = DPO.run(tmp_path, given={"model": model, "peft_config": None}, **options)
    trainer.train()
    own = dict(trainer.comlora_model.named_parameters())
    for name, value in kept.items():
        assert torch.equal(own[name.replace("default", "ref")], value)
    assert abs(logged(trainer, "rewards/chosen")[0]) < 1e-3
    winner = PeftModel.from_pretrained(make_model(), tmp_path / "winner")
    assert list(winner.peft_config) == ["default"]


# ---- Rungs and the winner ----


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_validation_is_trls_evaluation_of_each_branch(kind, tmp_path):
    """Each example counts once, whatever the batches; TRL's own means are over batches, so one batch here."""
    betas = {"comlora_branch_betas": BETAS} if kind in BETA else {}
    trainer = kind.run(tmp_path, comlora_k=3, **betas, per_device_eval_batch_size=13, max_steps=1)
    perturb(trainer)
    found = trainer.select()
    trainer.args.per_device_eval_batch_size = 13
    names = {"dpo": "eval_rewards/accuracies", "reward": "eval_accuracy"}
    for branch in range(3):
        trainer.competition.state.selection["winner"] = branch
        trainer.competition.follow_leader()
        metrics = trainer.evaluate()
        assert found["validation_nll"][branch] == pytest.approx(metrics["eval_loss"], abs=1e-5)
        if kind.name in names:
            measured = trainer.state.log_history[-1][names[kind.name]]
            assert found["validation_accuracy"][branch] == pytest.approx(measured, abs=1e-6)
    assert found["winner_by_validation_loss"] is None or not betas


def test_rungs_and_winner_go_by_reward_accuracy_and_ties_by_loss(tmp_path, monkeypatch):
    from comlora_trl.training.evaluation import Measured

    trainer = DPO.run(tmp_path, comlora_tournament=True, comlora_rungs="0.5:2", per_device_eval_batch_size=13)
    accuracy, loss = torch.tensor([8.0, 9.0, 9.0, 9.0]), torch.tensor([1.0, 5.0, 3.0, 4.0])
    figures = lambda *_: Measured(loss[:, None], accuracy[:, None], torch.tensor([13]))
    monkeypatch.setattr(trainer, "measure_batch", figures)
    trainer.train()
    state = trainer.competition.state
    assert state.leader == 2 and state.rungs[0]["retired"] == [0, 1]
    assert state.selection["winner_by_validation_loss"] == 2


def test_different_betas_are_compared_by_reward_accuracy_alone(tmp_path, capsys):
    betas = [0.1, 0.2, 0.4, 0.8]
    trainer = DPO.run(tmp_path, comlora_tournament=True, comlora_branch_betas=betas, learning_rate=1e-2)
    assert trainer.args.comlora_k == 4 and trainer.args.comlora_branch_learning_rates == [1e-2] * 4
    trainer.train()
    summary = trainer.competition_summary()
    assert [branch["beta"] for branch in summary["branches"]] == betas
    assert summary["winner_by_validation_loss"] is None and summary["measured"] == ["loss", "reward accuracy"]
    assert all(branch["share_of_wins"] is None for branch in summary["branches"])
    printed = capsys.readouterr().out
    assert "beta" in printed and "accuracy" in printed and "NLL" not in printed and "betas 0.1, 0.2" in printed


def test_a_grid_of_rates_and_betas(tmp_path):
    grid = {"comlora_branch_learning_rates": [1e-3, 1e-2], "comlora_branch_betas": [0.1, 0.5], "comlora_grid": True}
    args = DPO.run(tmp_path, comlora_tournament=True, **grid).args
    assert args.comlora_k == 4
    assert args.comlora_branch_learning_rates == [1e-3, 1e-3, 1e-2, 1e-2]
    assert args.comlora_branch_betas == [0.1, 0.5, 0.1, 0.5]
    again = type(args).from_arguments(args)
    assert again.comlora_branch_betas == args.comlora_branch_betas and again.comlora_k == 4


@pytest.mark.parametrize("kind", KINDS, ids=names)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"comlora_selector": True}, "comlora_selector=True is not possible with ComLoRA.*leave it out"),
        ({"comlora_lm_weight": 0.5}, "comlora_lm_weight=0.5 is not possible with ComLoRA"),
        ({"comlora_noise": 0.3}, "comlora_noise=0.3 does nothing with comlora_selector=False"),
    ],
    ids=names,
)
def test_what_is_refused(kind, options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        kind.run(tmp_path, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", BETA, ids=names)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"comlora_branch_betas": [0.1, 0.2], "comlora_winner_by": "validation_loss"}, "losses of different beta"),
        ({"comlora_branch_betas": [0.1, 0.2], "comlora_k": 3}, "2 betas is not possible: it must be comlora_k=3"),
        ({"comlora_branch_betas": [0.1, -0.2]}, "comlora_branch_betas=-0.2 is not possible"),
        ({"comlora_branch_betas": [0.1, 0.2], "comlora_grid": True}, "comlora_grid=True needs both"),
    ],
    ids=names,
)
def test_what_is_refused_of_betas(kind, options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        kind.run(tmp_path, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_another_trainers_branches_are_refused(kind, tmp_path):
    first = kind.run(tmp_path / "first", comlora_k=2)
    with pytest.raises(ValueError, match="has competing branches already.*exported winner"):
        kind.run(tmp_path / "second", comlora_k=2, given={"model": first.model, "peft_config": None})


def test_an_adapter_that_trl_would_not_find_is_refused(tmp_path):
    from peft import PeftModelForCausalLM

    model = PeftModelForCausalLM(make_model(), make_lora(), adapter_name="mine")
    with pytest.raises(ValueError, match="adapters mine, and TRL takes the one called 'default'"):
        DPO.run(tmp_path, given={"model": model, "peft_config": None})


# ---- What is left of a run, and a loss of the user's own ----


def test_a_reward_model_leaves_with_its_own_head(tmp_path):
    from transformers import AutoModelForSequenceClassification

    base = make_classifier()
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    given = {"model": str(tmp_path / "base"), "processing_class": None}
    trainer = REWARD.run(tmp_path, given=given, comlora_tournament=True, comlora_rungs="0.5:2", learning_rate=1e-2)
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(4)])
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
    torch.manual_seed(99)  # another head for the base
    fresh = AutoModelForSequenceClassification.from_pretrained(make_saved_base(tmp_path), num_labels=1)
    winner = PeftModel.from_pretrained(fresh, tmp_path / "winner").eval()
    with torch.no_grad():
        assert (winner(**batch).logits - expected).abs().max() < 1e-5
    heads = [trainer.comlora_model.named_branch_parameters(b) for b in trainer.competition.state.living]
    own = [next(p for name, p in head.items() if "score" in name) for head in heads]
    assert not torch.equal(*own)
    retired = tmp_path / "retired" / f"branch_{next(iter(trainer.competition.state.retired))}"
    PeftModel.from_pretrained(fresh, retired)
    text = (tmp_path / "winner" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in text and "text-classification" in text and "lm_eval" not in text
    assert not (tmp_path / "winner" / "lm_eval.yaml").exists()


def make_saved_base(folder):
    """A causal model of the classifier's weights, whose head is drawn anew where it is loaded."""
    model = make_model()
    model.model.load_state_dict(make_classifier().model.state_dict())
    model.save_pretrained(folder / "causal")
    return folder / "causal"


def test_the_winner_of_dpo_is_an_ordinary_adapter_with_a_card(tmp_path):
    trainer = DPO.run(tmp_path, comlora_branch_betas=[0.1, 0.5], learning_rate=1e-2)
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(4)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    winner = PeftModel.from_pretrained(make_model(), tmp_path / "winner").eval()
    with torch.no_grad():
        assert (winner(**inputs).logits - trainer.model.eval()(**inputs).logits).abs().max() < 1e-5
    text = (tmp_path / "winner" / "README.md").read_text()
    assert "| beta |" in text and "reward accuracy" in text and "`loss_type`" in text and "NLL" not in text


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_a_users_compute_loss_trains_every_branch(kind, tmp_path):
    def having(base):
        class Own(base):
            def compute_loss(self, model, inputs, *args, **kwargs):
                loss = base.compute_loss(self, model, inputs, *args, **kwargs)
                return 2 * loss

        return Own

    def penalised(base):
        class Own(base):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
                return logits.float().pow(2).mean()

        return Own

    for change in (having, penalised):
        from dataclasses import replace

        own = replace(kind, ours=change(kind.ours), trls=change(kind.trls))
        options = {"gradient_checkpointing": False, "max_steps": 4, **SGD}
        folder = tmp_path / change.__name__
        ours = own.run(folder / "ours", comlora_k=2, comlora_branch_learning_rates=[0.01, 0.02], **options)
        perturb(ours)
        trls = [own.run(folder / f"{rate}", trl=True, learning_rate=rate, **options) for rate in (0.01, 0.02)]
        for branch, trl in enumerate(trls):
            start_from(trl, ours, branch)
        ours.train()
        for branch, trl in enumerate(trls):
            trl.train()
            assert difference(ours, branch, trl) < 1e-5


def test_ktos_reward_accuracy_is_over_all_pairs_of_examples(tmp_path):
    from comlora_trl.trainers.kto import reward_accuracy

    rewards = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([True, True, False])
    assert reward_accuracy(rewards, labels).tolist() == [0.5, 0.5]
    found = []
    for size in (13, 4):
        trainer = KTO.run(tmp_path / f"{size}", comlora_branch_betas=[0.1, 0.5], per_device_eval_batch_size=size)
        perturb(trainer)
        found.append(trainer.select()["validation_accuracy"])
    assert found[0] == pytest.approx(found[1], abs=1e-6) and 0 < found[0][0] < 1
    model, data = trainer.comlora_model.eval(), trainer.eval_dataset
    gaps = []
    for example in data:
        ids = torch.tensor([example["prompt_ids"] + example["completion_ids"]])
        start = len(example["prompt_ids"])
        with torch.no_grad():
            model.set_adapter("branch_0")
            own = model(input_ids=ids).logits.log_softmax(-1)
            with model.disable_adapter():
                base = model(input_ids=ids).logits.log_softmax(-1)
        gap = (own - base)[0, start - 1 : -1].gather(-1, ids[0, start:, None]).sum().item()
        gaps.append((gap, example["label"]))
    pairs = [a > b for a, good in gaps for b, other in gaps if good and not other]
    assert found[0][0] == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_kto_refuses_what_its_criterion_or_its_kl_term_can_t_go_with(tmp_path):
    one = KTO.data(20).filter(lambda row: row["label"])
    with pytest.raises(ValueError, match="every validation example has label=True.*different beta"):
        KTO.run(tmp_path, given={"eval_dataset": one}, comlora_branch_betas=[0.1, 0.2])
    trainer = KTO.run(tmp_path, given={"eval_dataset": one}, comlora_k=2)
    perturb(trainer)
    found = trainer.select()
    assert found["winner"] == found["winner_by_validation_loss"]
    with pytest.raises(ValueError, match="per_device_train_batch_size=6 is not possible with comlora_rows='shared'"):
        KTO.run(tmp_path, comlora_tournament=True)
