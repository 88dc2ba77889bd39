"""Quantised bases: K = 1 is TRL's QLoRA, all branches at once are chunks, and what differs is bfloat16's rounding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import collate, make_arguments, make_dataset, make_lora, make_model, make_rows, make_tokenizer
from kinds import DPO, KTO, difference, logged, perturb, start_from
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.competition import CompetitionSettings
from comlora_trl.training.model import BranchPass, ComLoRAModel

pytest.importorskip("bitsandbytes")


def quantization(kind: str) -> object:
    if kind == "torchao":
        quantized = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        return TorchAoConfig(quantized.Int8WeightOnlyConfig())
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if kind == "nf4_bf16" else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def to_float32(trainer: Trainer) -> None:
    """Makes what trains float32."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@pytest.fixture
def run(base, tmp_path) -> Callable:
    """A short run; its adapters in float32, for TRL's bfloat16 ones round away what is compared."""
    runs = []

    def start(trainer_class: type, kind: str, **options: object) -> tuple[list[float], dict[str, Tensor]]:
        config = SFTConfig if trainer_class is SFTTrainer else ComLoRAConfig
        runs.append(tmp_path / str(len(runs)))
        options = {
            "max_steps": 4,
            "model_init_kwargs": {"dtype": "float32"},
            "gradient_checkpointing": False,
            **options,
        }
        trainer = trainer_class(
            str(base),
            config(**make_arguments(runs[-1], max_grad_norm=0.0, **options)),
            train_dataset=make_dataset(),
            eval_dataset=make_dataset(4),
            processing_class=make_tokenizer(),
            peft_config=make_lora(),
            quantization_config=quantization(kind),
        )
        to_float32(trainer)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        named = trainer.model.named_parameters()
        return losses, {n.replace("branch_0", "default"): p.detach().clone() for n, p in named if p.requires_grad}

    return start


def assert_equal(one: tuple, two: tuple, tolerance: float) -> None:
    assert one[0] == pytest.approx(two[0], abs=tolerance)
    assert one[1].keys() == two[1].keys() and one[1]
    for name, value in one[1].items():
        torch.testing.assert_close(value, two[1][name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["nf4", "nf4_bf16", "int8", "torchao"])
def test_one_branch_is_trls_qlora(run, kind):
    stock = run(SFTTrainer, kind)
    # It selects during training: bitsandbytes' 4-bit layers lose their gradient at a CPU's first evaluation
    mine = run(ComLoRASFTTrainer, kind, comlora_k=1, comlora_selector=False, eval_strategy="steps", eval_steps=2)
    assert_equal(mine, stock, 1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_branches_at_once_are_branches_in_chunks(run, kind):
    options = {"comlora_k": 2, "comlora_selector": False}
    assert_equal(
        run(ComLoRASFTTrainer, kind, **options), run(ComLoRASFTTrainer, kind, comlora_branch_chunk=1, **options), 2e-6
    )


@pytest.mark.parametrize("kind", [DPO, KTO], ids=str)
def test_branches_of_a_preference_trainer_are_trainers_of_their_own(kind, base, tmp_path):
    """Over nf4 each branch trains, and is measured, as TRL's own trainer at the branch's rate."""
    options = {"optim": "sgd", "max_grad_norm": 0.0, "gradient_checkpointing": False}
    options |= {"per_device_eval_batch_size": 13}  # TRL's mean is over batches
    options |= {"model_init_kwargs": {"dtype": "float32"}, "max_steps": 4}
    given = lambda: {"model": str(base), "quantization_config": quantization("nf4")}
    rates = [0.1, 0.3]
    ours = kind.run(tmp_path / "ours", given=given(), comlora_k=2, comlora_branch_learning_rates=rates, **options)
    to_float32(ours)
    perturb(ours)
    trls = [kind.run(tmp_path / f"{rate}", True, given(), learning_rate=rate, **options) for rate in rates]
    for branch, trl in enumerate(trls):
        to_float32(trl)
        start_from(trl, ours, branch)
    trained = ours.comlora_model.branch_parameters(0)
    start = [parameter.detach().clone() for parameter in trained]
    ours.train()
    assert min((p - before).abs().max() for p, before in zip(trained, start, strict=True)) > 1e-5
    measured = ours.competition.state.selection["validation_nll"]
    for branch, trl in enumerate(trls):
        trl.train()
        assert difference(ours, branch, trl) < 2e-6
        assert logged(ours, f"comlora/loss_{branch}") == pytest.approx(logged(trl, "loss"), abs=2e-6)
        assert measured[branch] == pytest.approx(trl.evaluate()["eval_loss"], abs=2e-6)


def test_bfloat16s_error_is_pefts(base):
    """Gradients over a 4-bit base with bfloat16 adapters and autocast, against the same weights in float32."""
    batch = collate(make_rows(unsupervised=()))

    def model(kind: str) -> nn.Module:
        dtype = torch.bfloat16 if kind == "nf4_bf16" else torch.float32
        loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization(kind), dtype=dtype)
        add_fused_lm_head(loaded, outputs=("log_probs", "entropy", "is_top1"))
        return loaded

    def gradients(model: nn.Module, seed: int, dtype: torch.dtype, **kwargs: object) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for parameter in trained.values():
            parameter.grad, parameter.data = None, torch.randn(parameter.shape).mul(0.1).bfloat16().to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model.train()(fused_lm_head=True, **batch, **kwargs)
        output.log_probs.sum().backward()
        return {name.replace("branch_0", "default"): p.grad.double() for name, p in trained.items()}

    exact, theirs = (get_peft_model(model(kind), make_lora()) for kind in ("nf4", "nf4_bf16"))
    mine = ComLoRAModel(model("nf4_bf16"), make_lora(), 1)
    everything = BranchPass(CompetitionSettings(k=1), (0,), 1, torch.ones(1, dtype=torch.bool))
    errors = [0.0, 0.0]
    for seed in range(10):
        expected = gradients(exact, seed, torch.float32)
        found = (
            gradients(theirs, seed, torch.bfloat16),
            gradients(mine, seed, torch.bfloat16, branch_pass=everything),
        )
        for place, one in enumerate(found):
            assert one.keys() == expected.keys()
            errors[place] += sum(((one[name] - value) ** 2).sum().item() for name, value in expected.items())
    assert 0 < errors[1] < 1.1 * errors[0]  # squares; 0.986 over 30 draws


def test_the_selector_stays_float32_over_a_quantised_base(base, tmp_path):
    """TRL makes what trains over a quantised base bfloat16, where the selector's small steps round to nothing."""
    seen = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            seen.update({name.split(".")[0]: p.dtype for name, p in model.named_parameters() if p.requires_grad})

    trainer = ComLoRASFTTrainer(
        str(base),
        ComLoRAConfig(**make_arguments(tmp_path, max_steps=1, model_init_kwargs={"dtype": "float32"})),
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(4),
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
        quantization_config=quantization("nf4"),
        callbacks=[Look()],
    )
    trainer.train()
    assert seen == {"base_model": torch.bfloat16, "selector": torch.float32}
