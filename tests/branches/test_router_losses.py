"""A mixture of experts' router loss in the trainer: each branch's own, of TRL's weight, however a step is cut."""

from pathlib import Path

import pytest
import torch
from conftest import difference, make_arguments, make_dataset, make_lora, make_tokenizer, parameters
from families import make_family
from trl import SFTConfig, SFTTrainer

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer


def mixture_trainer(
    kind: type[SFTTrainer], folder: Path, rows: list[int] | None = None, **options: object
) -> SFTTrainer:
    config = ComLoRAConfig if kind is ComLoRASFTTrainer else SFTConfig
    arguments = config(**make_arguments(folder, router_aux_loss_coef=0.5, **options))
    lora = make_lora(target_modules=["q_proj", "v_proj"])
    data = make_dataset() if rows is None else make_dataset().select(rows)
    given = {"train_dataset": data, "eval_dataset": make_dataset(3), "processing_class": make_tokenizer()}
    return kind(make_family("Mixtral"), arguments, **given, peft_config=lora)


def train_and_compare(ours: ComLoRASFTTrainer, alone: list[SFTTrainer]) -> None:
    """Trains the branches at once, and each from the same start by TRL's trainer: to the same adapters."""
    start = {n: p.detach().clone() for n, p in ours.comlora_model.named_parameters() if p.requires_grad}
    ours.train()
    found = dict(ours.comlora_model.named_parameters())
    for branch, trainer in enumerate(alone):
        adapter = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        for name, parameter in adapter.items():
            parameter.data.copy_(start[name.replace(".default.", f".branch_{branch}.")])
        trainer.train()
        for name, parameter in adapter.items():
            same = found[name.replace(".default.", f".branch_{branch}.")]
            torch.testing.assert_close(same, parameter, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 1])
def test_branches_with_rates_of_their_own_have_their_routers_loss_whole(tmp_path, chunk):
    """Each is the stock trainer's run at its rate, and what is logged is the mean of theirs."""
    rates, options = [0.2, 0.4], {"optim": "sgd", "max_steps": 3}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    own = {"comlora_selector": False, "comlora_branch_learning_rates": rates, "comlora_branch_chunk": chunk}
    ours = mixture_trainer(ComLoRASFTTrainer, tmp_path / "ours", **options, **own)
    alone = [
        mixture_trainer(SFTTrainer, tmp_path / str(branch), **options, learning_rate=rate)
        for branch, rate in enumerate(rates)
    ]
    train_and_compare(ours, alone)
    runs = [[entry for entry in one.state.log_history if "loss" in entry] for one in alone]
    logs = [entry for entry in ours.state.log_history if "loss" in entry]
    for figure in ("loss", "aux_loss"):
        expected = [sum(entry[figure] for entry in step) / len(rates) for step in zip(*runs, strict=True)]
        assert [entry[figure] for entry in logs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("rows, chunk", [(2, None), (4, None), (4, 1)])
def test_shared_rows_have_their_routers_loss_whole(rows, chunk, tmp_path):
    """A branch's own is the mean over the micro-batches that it has rows of: here each row's, however they are cut."""

    def trained(rows, chunk=None):
        cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows, "max_steps": 3}
        shared = {"comlora_k": 4, "comlora_rows": "shared", "comlora_selector": False, "comlora_branch_chunk": chunk}
        trainer = mixture_trainer(ComLoRASFTTrainer, tmp_path / f"{rows}-{chunk}", **cut, **shared)
        trainer.train()
        return trainer, [entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry]

    (one, logged), (other, also) = trained(1), trained(rows, chunk)
    assert difference(parameters(one), parameters(other)) < 1e-5
    assert logged == pytest.approx(also, abs=1e-4)


@pytest.mark.parametrize("cut", [(1, 6), (3, 2)])
def test_unequal_shares_of_rows_have_their_routers_loss_whole(cut, tmp_path):
    """Of six rows two branches get two each and two get one: each is as alone on its own, row by row."""
    once = {"optim": "sgd", "learning_rate": 0.2, "max_steps": 1, "train_sampling_strategy": "sequential"}
    shared = {"comlora_k": 4, "comlora_rows": "shared", "comlora_selector": False}
    size = {"per_device_train_batch_size": cut[0], "gradient_accumulation_steps": cut[1]}
    ours = mixture_trainer(ComLoRASFTTrainer, tmp_path / "ours", **once, **shared, **size)
    alone = []
    for branch in range(4):
        rows = [row for row in range(6) if row % 4 == branch]
        size = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(rows)}
        alone.append(mixture_trainer(SFTTrainer, tmp_path / str(branch), rows, **once, **size))
    train_and_compare(ours, alone)


def test_a_mixture_of_experts_in_and_outside_the_loop_is_trls(tmp_path):
    """The routers' loss, which the Trainer shares out among its loop's accumulation steps."""
    found = []
    for kind, own in ((SFTTrainer, {}), (ComLoRASFTTrainer, {"comlora_k": 1, "comlora_selector": False})):
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3}
        trainer = mixture_trainer(kind, tmp_path / kind.__name__, **options, **own)
        trainer.model.train()
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
        losses = [trainer.compute_loss(trainer.model, dict(batch)).item()]
        trainer.train()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.model.train()
        found.append([*losses, trainer.compute_loss(trainer.model, dict(batch)).item()])
    assert found[0] == pytest.approx(found[1], abs=1e-6) and len(found[0]) == 5


def test_the_loss_outside_the_loop_has_the_routers_loss_of_its_batch(tmp_path):
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = mixture_trainer(ComLoRASFTTrainer, tmp_path, **options)
    batch, losses = next(iter(trainer.get_train_dataloader())), []
    trainer.model.train()
    for coefficient in (0.0, 0.5):
        trainer.router_aux_loss_coef = coefficient
        losses.append(trainer.compute_loss(trainer.model, dict(batch)).item())
    router = trainer._metrics["train"]["aux_loss"][-1]
    assert losses[1] - losses[0] == pytest.approx(0.5 * router, abs=1e-5) and router > 1
