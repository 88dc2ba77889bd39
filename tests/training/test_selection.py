"""Evaluation reports, selection decides: on the validation set, each example once, within the training loop."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import make_arguments, make_dataset, make_lora, make_model, make_tokenizer
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import RichProgressCallback

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.training.checkpoints import load_state
from comlora_trl.training.evaluation import BatchSize, own_batches
from comlora_trl.training.hold_out import hold_out


def selection(trainer: ComLoRASFTTrainer) -> dict:
    return trainer.competition.state.selection


def literal_nll(trainer: ComLoRASFTTrainer, branch: int, dataset: Dataset) -> float:
    """Mean NLL of one branch: example by example, in PEFT's own forward."""
    model = trainer.comlora_model.eval()
    model.set_adapter(f"branch_{branch}")
    total, tokens = 0.0, 0
    for example in dataset:
        batch = trainer.data_collator([example])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        keep = labels != -100
        total -= logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[keep].sum().item()
        tokens += int(keep.sum())
    return total / tokens


class Meddler(TrainerCallback):
    """Evaluates and predicts on other data in the middle of training."""

    trainer: ComLoRASFTTrainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (3, 8):
            self.trainer.evaluate(make_dataset(4))
            self.trainer.predict(self.trainer.train_dataset.select(range(4)))


def test_evaluations_on_other_data_change_nothing(train):
    calm = train(comlora_k=3, comlora_winner_by="validation_loss")
    meddler = Meddler()
    trainer = train(start=False, comlora_k=3, comlora_winner_by="validation_loss", trainer={"callbacks": [meddler]})
    meddler.trainer = trainer
    trainer.train()
    assert selection(trainer) == selection(calm) and selection(trainer)["step"] == 8
    before, leader = selection(trainer), trainer.comlora_model.active_adapter
    trainer.evaluate(make_dataset(5))
    trainer.predict(trainer.eval_dataset)
    assert selection(trainer) == before and trainer.comlora_model.active_adapter == leader


def test_only_the_validation_sets_evaluation_has_the_branches_figures(train):
    class Asking(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if control.should_evaluate:
                seen.append(trainer.evaluate(make_dataset(5), metric_key_prefix="other"))
                seen.append(trainer.predict(trainer.eval_dataset).metrics)

    seen, options = [], {"comlora_k": 2, "comlora_selector": False, "eval_strategy": "steps", "eval_steps": 4}
    trainer = train(start=False, trainer={"callbacks": [Asking()]}, **options)
    trainer.train()
    assert len(seen) == 4 and not any("comlora" in name for metrics in seen for name in metrics)
    calm = [entry for entry in train(**options).state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in calm] == [4, 8] and all("eval_comlora/loss_1" in entry for entry in calm)


def test_the_figures_are_those_of_each_branch_alone(train, float64):
    trainer = train(comlora_k=3, comlora_winner_by="validation_loss", per_device_eval_batch_size=4)
    result = selection(trainer)
    expected = [literal_nll(trainer, branch, trainer.eval_dataset) for branch in range(3)]
    assert result["validation_nll"] == pytest.approx(expected, abs=1e-9) and result["examples"] == 13
    assert result["winner"] == expected.index(min(expected))


def test_dict_eval_sets_add_up_and_are_in_the_checkpoint(train, float64):
    sets = {"a": make_dataset(5), "b": make_dataset(13).select(range(5, 13))}
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer = train(comlora_k=2, comlora_winner_by="validation_loss", trainer={"eval_dataset": sets}, **options)
    whole = train(comlora_k=2, comlora_winner_by="validation_loss")
    assert selection(trainer)["examples"] == 13
    assert selection(trainer)["validation_nll"] == pytest.approx(selection(whole)["validation_nll"], abs=1e-9)
    saved = load_state(Path(trainer.args.output_dir) / "checkpoint-8").selection
    assert saved == selection(trainer)
    logged = [entry for entry in trainer.state.log_history if "eval_a_loss" in entry]
    assert {"eval_a_comlora/loss_1", "eval_a_comlora/winner"} <= logged[0].keys()


def test_what_an_evaluation_measures_is_the_leader(train, float64):
    """eval_loss, compute_metrics and a callback's generation: the branch that leads at that step."""
    seen = []

    def compute_metrics(prediction):
        logits, labels = torch.tensor(prediction.predictions[:, :-1]), torch.tensor(prediction.label_ids[:, 1:])
        keep = labels != -100
        nll = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][keep]
        return {"nll": nll.mean().item()}

    class Listener(TrainerCallback):
        def on_evaluate(self, args, state, control, model, metrics, **kwargs):
            seen.append((model.active_adapter, metrics))

    given = {"compute_metrics": compute_metrics, "callbacks": [Listener()]}
    options = {"comlora_k": 3, "comlora_winner_by": "validation_loss", "eval_strategy": "steps", "eval_steps": 2}
    train(trainer=given, per_device_eval_batch_size=13, **options)
    assert len(seen) == 4
    for active, metrics in seen:
        leader = metrics["eval_comlora/winner"]
        own = metrics[f"eval_comlora/loss_{leader}"]
        assert active == f"branch_{leader}"
        assert own == min(metrics[f"eval_comlora/loss_{branch}"] for branch in range(3))
        assert metrics["eval_loss"] == pytest.approx(own, abs=1e-6)
        assert metrics["eval_nll"] == pytest.approx(own, abs=1e-4)  # the Trainer rounds logits to float32


def test_an_evaluation_that_a_callback_asks_for_is_the_leaders_too(train, float64):
    """As transformers' own examples do: `control.should_evaluate` on a step that `eval_strategy` knows nothing of."""
    seen = []

    class Asking(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = control.should_save = state.global_step == 5

        def on_evaluate(self, args, state, control, model, metrics, **kwargs):
            seen.append((model.active_adapter, metrics))

    options = {"comlora_k": 3, "comlora_winner_by": "validation_loss", "max_steps": 6}
    trainer = train(trainer={"callbacks": [Asking()]}, per_device_eval_batch_size=13, **options)
    ((active, metrics),) = seen
    own = [metrics[f"eval_comlora/loss_{branch}"] for branch in range(3)]
    assert active == f"branch_{own.index(min(own))}" and metrics["eval_loss"] == pytest.approx(min(own), abs=1e-6)
    assert load_state(Path(trainer.args.output_dir) / "checkpoint-5").selection["step"] == 5


def test_the_winner_is_out_before_a_callback_fails_and_logs_end_with_the_summary(train):
    class Failing(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            raise RuntimeError("a tracker is gone")

    trainer = train(start=False, comlora_k=2, trainer={"callbacks": [Failing(), RichProgressCallback()]})
    with pytest.raises(RuntimeError, match="a tracker is gone"):
        trainer.train()
    assert (Path(trainer.args.winner_dir) / "adapter_model.safetensors").is_file()
    history = trainer.state.log_history
    assert "train_loss" in history[-1] and "eval_comlora/winner" in history[-2] and "loss" in history[-3]


def test_rich_progress(train):
    trainer = train(comlora_k=2, trainer={"callbacks": [RichProgressCallback()]}, disable_tqdm=False)
    assert (Path(trainer.args.winner_dir) / "adapter_model.safetensors").is_file()


def test_a_second_training_is_a_new_competition(train):
    trainer = train(comlora_k=2, max_steps=3)
    first, wins = selection(trainer), trainer.competition.state.wins
    trainer.train()
    assert selection(trainer) != first and sum(trainer.competition.state.wins) == sum(wins) == 3
    other = train(start=False, comlora_k=2, comlora_winner_dir=trainer.args.winner_dir, comlora_overwrite_winner=True)
    other.args.comlora_overwrite_winner = False  # the folder was filled after this trainer was made
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        other.train()
    assert other.state.global_step == 0


class Spoil(TrainerCallback):
    """Ruins both branches late in training."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            for branch in (0, 1):
                for parameter in model.branch_parameters(branch):
                    parameter.data.mul_(30)


def test_the_best_checkpoints_leader_wins_and_all_wins_count(train):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trainer = train(comlora_k=2, load_best_model_at_end=True, trainer={"callbacks": [Spoil()]}, **options)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    state = trainer.competition.state
    assert state.selection == load_state(best).selection and sum(state.wins) == 6
    exported = load_file(Path(trainer.args.winner_dir) / "adapter_model.safetensors")
    kept = load_file(best / f"branch_{state.selection['winner']}" / "adapter_model.safetensors")
    assert all(torch.equal(exported[name], kept[name]) for name in kept)


def test_a_best_checkpoints_leader_that_diverged_since_gives_way_to_the_next_best(train):
    class Diverge(Spoil):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                for branch in range(3):
                    by = math.inf if model.branch_names[branch] == model.active_adapter else 30
                    model.branch_parameters(branch)[-1].data.add_(1).mul_(by)

    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    options |= {"comlora_k": 3, "comlora_winner_by": "validation_loss", "load_best_model_at_end": True}
    trainer = train(trainer={"callbacks": [Diverge()]}, **options)
    state, best = trainer.competition.state, Path(trainer.state.best_model_checkpoint)
    then = load_state(best).selection
    assert list(state.disqualified) == [then["winner"]] and best.name != "checkpoint-6"
    losses = {branch: then["validation_nll"][branch] for branch in state.living}
    assert selection(trainer)["winner"] == state.leader == min(losses, key=losses.get)
    found = selection(trainer)["validation_nll"]
    assert found == [pytest.approx(losses[branch]) if branch in losses else None for branch in range(3)]


def test_early_stopping_ends_in_a_winner(train):
    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = train(comlora_k=2, trainer={"callbacks": [Stop()]}, eval_strategy="steps", eval_steps=3)
    assert selection(trainer)["step"] == trainer.state.global_step == 3
    assert (Path(trainer.args.winner_dir) / "competition.json").is_file()


def test_validation_rows_are_not_dropped_and_adapters_keep_their_precision(train):
    trainer = train(
        comlora_k=2, double=False, dataloader_drop_last=True, per_device_eval_batch_size=8, bf16_full_eval=True
    )
    assert selection(trainer)["examples"] == 13
    trainer.evaluate()
    weights = load_file(trainer.export_winner(Path(trainer.args.output_dir) / "again") / "adapter_model.safetensors")
    first = load_file(Path(trainer.args.winner_dir) / "adapter_model.safetensors")
    assert all(
        torch.equal(weights[name], first[name]) and value.dtype == torch.float32 for name, value in first.items()
    )


def test_adapters_keep_their_precision_when_an_evaluation_fails(train):
    def fail(prediction):
        raise RuntimeError("no such metric")

    trainer = train(start=False, comlora_k=2, double=False, bf16_full_eval=True, trainer={"compute_metrics": fail})
    with pytest.raises(RuntimeError, match="no such metric"):
        trainer.evaluate()
    assert {parameter.dtype for parameter in trainer.comlora_model.trainable_parameters()} == {torch.float32}


def test_a_disqualified_branch_has_no_figures_and_cannot_lead(train):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.branch_parameters(1)[-1].data.fill_(math.inf)

    trainer = train(comlora_k=3, trainer={"callbacks": [Poison()]})
    result = selection(trainer)
    assert result["validation_nll"][1] is None and result["scores"][1] is None and result["winner"] != 1
    json.loads((Path(trainer.args.winner_dir) / "competition.json").read_text(), parse_constant=pytest.fail)


# ---- What the validation set is ----


@pytest.mark.parametrize("rows, size", [(5, 1), (64, 6), (1199, 119), (5000, 120)])
def test_small_data_gives_a_tenth(rows, size, tmp_path, caplog):
    data = Dataset.from_list([{"text": str(row)} for row in range(rows)])
    rest, held_out = hold_out(data, None, ComLoRAConfig(**make_arguments(tmp_path)))
    assert len(held_out) == size and len(rest) == rows - size
    assert (f"{size} of {rows} training examples are held out" in caplog.text) == (size < 120)


def stream(rows: int, shuffled: bool = False) -> IterableDataset:
    data = Dataset.from_list([{"text": f"row {row}"} for row in range(rows)]).to_iterable_dataset(num_shards=2)
    return data.shuffle(seed=0, buffer_size=50) if shuffled else data


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_stream_never_trains_on_what_was_held_out(shuffled, tmp_path):
    rest, held_out = hold_out(stream(40, shuffled), None, ComLoRAConfig(**make_arguments(tmp_path)))
    own = {example["text"] for example in held_out}
    assert len(own) == 4
    for epoch in range(3):
        rest.set_epoch(epoch)
        seen = [example["text"] for example in rest]
        assert len(seen) == 36 and not own & set(seen)


def test_all_processes_hold_the_same_examples_of_a_stream_out(tmp_path, monkeypatch):
    """One that shuffles without a seed gives each process other examples first: the main process's are everyone's."""
    theirs = [{"text": f"row {row}"} for row in range(30, 34)]
    monkeypatch.setattr("comlora_trl.training.hold_out.broadcast_object_list", lambda own: theirs[: len(own)])
    rest, held_out = hold_out(stream(40), None, ComLoRAConfig(**make_arguments(tmp_path)))
    assert held_out.to_list() == theirs and not set(held_out["text"]) & {example["text"] for example in rest}


@pytest.mark.parametrize("rows", [2, 3])
def test_a_stream_that_is_too_short(rows, tmp_path):
    options = ComLoRAConfig(**make_arguments(tmp_path, comlora_validation_size=3))
    with pytest.raises(ValueError, match=f"takes all of the {rows} training examples"):
        hold_out(stream(rows), None, options)


def test_one_branch_holds_nothing_out(tmp_path):
    data = make_dataset(40)
    rest, held_out = hold_out(data, None, ComLoRAConfig(**make_arguments(tmp_path, comlora_k=1)))
    assert rest is data and held_out is None


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_example_counts_once_and_all_processes_get_as_many_batches(processes, streamed):
    data = Dataset.from_list([{"text": str(row)} for row in range(9)])
    data = data.to_iterable_dataset() if streamed else data
    size = BatchSize(2 * processes, torch.device("cpu"))
    batches = [list(own_batches(data, size, rank, processes)) for rank in range(processes)]
    assert len({len(own) for own in batches}) == 1
    counted = [example["text"] for own in batches for examples, count in own for example in examples[:count]]
    assert sorted(counted, key=int) == [str(row) for row in range(9)]
    assert all(examples for own in batches for examples, _ in own)


def test_a_batch_grows_until_it_has_as_many_tokens_as_fit():
    size, data = (
        BatchSize(2, torch.device("cpu")),
        [{"input_ids": [0] * length} for length in (3, 3, 2, 2, 2, 9, 2, 2)],
    )
    groups = size.groups(data)
    assert [len(one["input_ids"]) for one in next(groups)] == [3, 3]  # nothing is known of the memory yet
    size.tokens = 8
    assert [[len(one["input_ids"]) for one in group] for group in groups] == [[2, 2, 2], [9, 2], [2]]
    padded = BatchSize(2, torch.device("cpu"), multiple=4)
    padded.tokens = 8  # two rows of 3 tokens take 8 with their padding
    assert [len(group) for group in padded.groups([{"input_ids": [0] * 3}] * 5)] == [2, 2, 1]
    unknown = BatchSize(2, torch.device("cpu"))
    unknown.tokens = 100
    assert [len(group) for group in unknown.groups([{"text": "a"}] * 5)] == [2, 2, 1]


def test_a_batch_grows_into_the_memory_that_training_has_needed(monkeypatch):
    """With a stand-in for PyTorch's counts, of which the last one is an allocator that does not count."""
    counts = iter([0, 3000, 3000, 3000])
    monkeypatch.setattr(BatchSize, "_allocated", lambda self: next(counts))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1500)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (800, 0))
    size = BatchSize(2, torch.device("cuda"), layers=3)
    with size.watched(100):  # 10 bytes a token and layer
        pass
    assert size.tokens == 80  # of the 1000 bytes of room 800 are free
    with size.watched(100):
        pass
    assert size.tokens == 80
    assert BatchSize(2, torch.device("cpu"), layers=3).layers == 0


def test_held_out_stream_in_a_run(tmp_path):
    config = ComLoRAConfig(**make_arguments(tmp_path, comlora_validation_size=9, max_steps=2))
    data = make_dataset(40).to_iterable_dataset()
    trainer = ComLoRASFTTrainer(
        make_model(), config, train_dataset=data, processing_class=make_tokenizer(), peft_config=make_lora()
    )
    trainer.train()
    assert selection(trainer)["examples"] == 9
