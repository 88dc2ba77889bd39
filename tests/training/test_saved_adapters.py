"""Every adapter that is written gives, on a fresh base in plain PEFT, the logits of the model that trained."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TARGETS, make_arguments, make_dataset, make_lora, make_model, make_tokenizer
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.training.export import export_checkpoint
from comlora_trl.training.model import ComLoRAModel

IDS = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(0))
ADDED = 5  # tokens by which a vocabulary is resized
ALONE = {"comlora_k": 1, "comlora_selector": False}
PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}


def resized(model: PreTrainedModel) -> PreTrainedModel:
    """With new tokens, whose embeddings are random: another process would draw others."""
    model.resize_token_embeddings(model.config.vocab_size + ADDED, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-ADDED:] = torch.randn(ADDED, 32)
    return model


def with_gradients(model: PreTrainedModel) -> PreTrainedModel:
    """As PEFT's `preprocess_loraga` leaves it."""
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module._peft_loraga_grad = torch.randn_like(module.weight)
    return model


def with_covariances(model: PreTrainedModel) -> PreTrainedModel:
    preprocess_corda(model, make_lora(init_lora_weights="corda"), run_model=lambda: model(IDS[:1]))
    return model


def started(**lora: Any) -> Callable[[PreTrainedModel], PeftModel]:
    """An adapter to go on from, as it was initialised."""
    return lambda model: get_peft_model(model, make_lora(**lora))


def started_and_trained(**lora: Any) -> Callable[[PreTrainedModel], PeftModel]:
    def start(model: PreTrainedModel) -> PeftModel:
        adapted = get_peft_model(model, make_lora(**lora))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter += 0.1 * torch.randn_like(parameter)
        return adapted

    return start


def from_a_folder(**lora: Any) -> Callable[[PreTrainedModel], str]:
    def start(model: PreTrainedModel) -> str:
        folder = f"{model.name_or_path}-adapter"
        started_and_trained(**lora)(model).save_pretrained(folder)
        return folder

    return start


@dataclass
class Case:
    """One PEFT configuration.

    Attributes:
        lora: fields of the configuration; None where the run goes on from an adapter.
        prepare: makes what the trainer is given of a base.
        base: fields of the base's configuration.
        run: arguments of the run.
        loads_resized: whether a fresh base is resized before the adapter is put on it.
        k: branches.
    """

    lora: dict[str, Any] | None = field(default_factory=dict)
    prepare: Callable[[PreTrainedModel], Any] = lambda model: model
    base: dict[str, Any] = field(default_factory=dict)
    loads_resized: bool = False
    k: int = 3


TIED = {"tie_word_embeddings": True}
CASES = {
    "resized": Case(prepare=resized, loads_resized=True),
    "resized, tied": Case(prepare=resized, base=TIED, loads_resized=True),
    "resized, one branch": Case(prepare=resized, loads_resized=True, k=1),
    "adapted embeddings": Case({"target_modules": ["embed_tokens", "q_proj"]}),
    "tokens": Case({"trainable_token_indices": [40, 41, 77]}, k=1),
    "tokens, resized": Case({"trainable_token_indices": [40, 130]}, resized, loads_resized=True, k=1),
    "head": Case({"modules_to_save": ["lm_head"]}, k=1),
    "embeddings and head": Case({"modules_to_save": ["embed_tokens", "lm_head"]}, k=1),
    "head, resized": Case({"modules_to_save": ["lm_head"]}, resized, loads_resized=True, k=1),
    "embeddings, tied": Case({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, base=TIED, k=1),
    "norms": Case({"modules_to_save": ["input_layernorm"]}, k=1),
    "biases": Case({"bias": "all"}, base={"attention_bias": True}, k=1),
    "replicated layers": Case({"layer_replication": [[0, 2], [1, 2]]}, k=1),
    "dora": Case({"use_dora": True}),
    "pissa": Case({"init_lora_weights": "pissa"}, k=1),
    "pissa, by iterations": Case({"init_lora_weights": "pissa_niter_2"}, k=1),
    "pissa with dora": Case({"init_lora_weights": "pissa", "use_dora": True}, k=1),
    "pissa and head": Case({"init_lora_weights": "pissa", "modules_to_save": ["lm_head"]}, k=1),
    "olora, patterns": Case({"init_lora_weights": "olora", **PATTERNS}, k=1),
    "lora-ga": Case({"init_lora_weights": "lora_ga", "lora_ga_config": {}}, with_gradients, k=1),
    "corda": Case({"init_lora_weights": "corda"}, with_covariances, k=1),
    "eva": Case({"init_lora_weights": "eva"}, k=1),
    "mica": Case({"init_lora_weights": "mica"}, k=1),
    "orthogonal": Case({"init_lora_weights": "orthogonal"}),
    "on from pissa": Case(None, started(init_lora_weights="pissa")),
    "on from pissa, one branch": Case(None, started(init_lora_weights="pissa"), k=1),
    "on from pissa, trained": Case(None, started_and_trained(init_lora_weights="pissa")),
    "on from pissa, a folder": Case(None, from_a_folder(init_lora_weights="pissa")),
    "on from olora, patterns": Case(None, started_and_trained(init_lora_weights="olora", **PATTERNS)),
    "on from lora-ga": Case(
        None, lambda model: started(init_lora_weights="lora_ga", lora_ga_config={})(with_gradients(model))
    ),
    "on from corda": Case(None, lambda model: started(init_lora_weights="corda")(with_covariances(model))),
    "on from a head": Case(None, from_a_folder(modules_to_save=["lm_head"]), k=1),
    "on from tokens": Case(None, from_a_folder(trainable_token_indices=[40, 41, 77]), k=1),
    "on from biases": Case(None, started_and_trained(bias="all"), base={"attention_bias": True}, k=1),
    "on from replicated layers": Case(None, from_a_folder(layer_replication=[[0, 2], [1, 2]]), k=1),
    "on from a resized base": Case(None, lambda model: from_a_folder()(resized(model)), loads_resized=True),
}


def logits(model: nn.Module) -> Tensor:
    training = model.training
    with torch.no_grad():
        found = model.eval()(input_ids=IDS).logits
    model.train(training)
    return found


def export_script() -> Any:
    file = Path(__file__).parents[2] / "scripts" / "export_winner.py"
    specification = importlib.util.spec_from_file_location("export_winner", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def all_places(trainer: ComLoRASFTTrainer, given: Any, folder: Path, monkeypatch: Any) -> dict[str, tuple[Path, int]]:
    """Writes adapters everywhere: each place with its branch."""
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-4"
    winner = trainer.determine_winner()
    living = trainer.competition.state.living
    places = {"winner": (Path(trainer.args.winner_dir), winner), "checkpoint's root": (checkpoint, winner)}
    for branch in living:
        places[f"checkpoint {branch}"] = checkpoint / f"branch_{branch}", branch
        trainer.export_branch(branch, folder / f"export {branch}", False)
        places[f"export {branch}"] = folder / f"export {branch}", branch
    for branch in trainer.competition.state.retired:
        places[f"retired {branch}"] = Path(trainer.args.output_dir) / "retired" / f"branch_{branch}", branch
    export_checkpoint(checkpoint, None, folder / "from checkpoint")
    places["from checkpoint"] = folder / "from checkpoint", winner
    export_script().main([str(checkpoint), "--branch", "all", "--output", str(folder / "script")])
    for branch in range(trainer.comlora_model.k):
        places[f"script {branch}"] = folder / "script" / f"branch_{branch}", branch
    trainer.save_model(str(folder / "saved"))
    places["save_model"] = folder / "saved", winner
    for name, model in {"save_pretrained": trainer.model, "the given model's": given}.items():
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder / name))
            places[name] = folder / name, winner
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: type("Url", (), {"repo_id": "someone/tiny"}))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *args, folder_path, **kwargs: pushed.append(folder_path))
    pushed: list[str] = []
    trainer.push_to_hub()
    places["push_to_hub"] = Path(pushed[-1]), winner
    return places


@pytest.mark.parametrize("name", CASES)
def test_a_written_adapter_is_the_branch_on_a_fresh_base(name, tmp_path, monkeypatch):
    case, base = CASES[name], tmp_path / "base"
    make_model(**case.base).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    torch.manual_seed(1)
    given = case.prepare(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))

    seen: dict[int, Tensor] = {}
    snapshot = ComLoRAModel.snapshot

    def watched(model: ComLoRAModel, branch: int, *args: Any) -> Any:
        active = model.active_adapter
        model.set_adapter(f"branch_{branch}")
        seen[branch] = logits(model)
        model.set_adapter(active)
        return snapshot(model, branch, *args)

    monkeypatch.setattr(ComLoRAModel, "snapshot", watched)
    options = ALONE if case.k == 1 else {"comlora_k": case.k, "comlora_rungs": f"0.5:{case.k - 1}"}
    options |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = ComLoRASFTTrainer(
        given,
        ComLoRAConfig(**make_arguments(tmp_path / "out", learning_rate=3e-2, **options)),
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(5),
        processing_class=make_tokenizer(),
        peft_config=None if case.lora is None else make_lora(**case.lora),
    )
    before = logits(trainer.model)
    trainer.train()
    assert not torch.allclose(logits(trainer.model), before, atol=1e-3)
    places = all_places(trainer, given, tmp_path, monkeypatch)
    for place, (folder, branch) in places.items():
        torch.manual_seed(2)
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        found = logits(PeftModel.from_pretrained(resized(fresh) if case.loads_resized else fresh, folder))
        torch.testing.assert_close(
            found, seen[branch], rtol=0, atol=1e-5, msg=lambda text, place=place: f"{place}: {text}"
        )


def trainer_of(given: Any, folder: Path, lora: dict[str, Any] | None = None, **options: Any) -> ComLoRASFTTrainer:
    return ComLoRASFTTrainer(
        given,
        ComLoRAConfig(**make_arguments(folder, **{"max_steps": 4, "learning_rate": 3e-2, **options})),
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(5),
        processing_class=make_tokenizer(),
        peft_config=None if lora is None else make_lora(**lora),
    )


def on_a_fresh_base(folder: str) -> Tensor:
    return logits(PeftModel.from_pretrained(make_model(), folder))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_base_without_a_name_is_as_the_initialisation_left_it(method, k, tmp_path):
    options = ALONE if k == 1 else {"comlora_k": k}
    trainer = trainer_of(started(init_lora_weights=method)(make_model()), tmp_path / "new", **options)
    trainer.train()
    torch.testing.assert_close(on_a_fresh_base(trainer.args.winner_dir), logits(trainer.model), rtol=0, atol=1e-5)
    with pytest.raises(
        ValueError, match=f"initialised by '{method}'.* has no name to compare it with .*: convert the"
    ):
        trainer_of(started_and_trained(init_lora_weights=method)(make_model()), tmp_path / "trained", **options)


def test_a_base_that_cannot_be_compared_is_refused_in_a_line(tmp_path):
    given = started(init_lora_weights="pissa")(make_model())
    given.peft_config["default"].base_model_name_or_path = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere can't be loaded to find the change") as caught:
        trainer_of(given, tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1
    make_model(seed=5).save_pretrained(tmp_path / "other")
    given = started(init_lora_weights="pissa")(make_model())
    given.peft_config["default"].base_model_name_or_path = str(tmp_path / "other")
    with pytest.raises(ValueError, match="the base given here differs from .*other by more than that"):
        trainer_of(given, tmp_path / "run")


def test_an_adapter_that_was_converted_goes_on_with_its_own_rank(tmp_path):
    first = trainer_of(make_model(), tmp_path / "a", {"init_lora_weights": "pissa"}, **ALONE)
    first.train()
    given = PeftModel.from_pretrained(make_model(), first.args.winner_dir)
    second = trainer_of(given, tmp_path / "b", comlora_k=2)
    second.train()
    assert second.model.peft_config["branch_0"].r == 8
    torch.testing.assert_close(on_a_fresh_base(second.args.winner_dir), logits(second.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "lora", [{"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}], ids=["pissa", "head"]
)
def test_a_run_resumes_with_what_its_checkpoint_holds(lora, tmp_path):
    options = {**ALONE, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(make_model(), tmp_path / "a", lora, **options)
    whole.train()
    resumed = trainer_of(make_model(), tmp_path / "b", lora, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    values = dict(resumed.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(values[name], parameter, rtol=0, atol=1e-6)
    if "init_lora_weights" in lora:
        other = trainer_of(make_model(seed=3), tmp_path / "c", lora, **options)
        with pytest.raises(ValueError, match="trained on a base that another initialisation has changed"):
            other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


@pytest.mark.parametrize("start", [False, True])
def test_the_base_without_its_branches_is_whole_again(start, tmp_path):
    lora = {"init_lora_weights": "pissa", **PATTERNS}
    given = started(**lora)(make_model()) if start else make_model()
    trainer = trainer_of(given, tmp_path, None if start else lora, **ALONE)
    trainer.train()
    expected = logits(trainer.model)
    torch.testing.assert_close(logits(trainer.model.unload()), logits(make_model()), rtol=0, atol=1e-5)
    torch.testing.assert_close(on_a_fresh_base(trainer.args.winner_dir), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", [False, True])
def test_loftq_is_done_again_where_the_adapter_is_loaded(start, tmp_path, monkeypatch):
    def rounded(weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int) -> tuple[Tensor, Tensor, Tensor]:
        """PEFT's own needs a GPU."""
        rest = weight.data - (coarse := (weight.data * 50).round() / 50)
        u, s, v = torch.linalg.svd(rest)
        return coarse, s[:reduced_rank, None] * v[:reduced_rank], u[:, :reduced_rank]

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", rounded)
    lora = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    given = started_and_trained(**lora)(make_model()) if start else make_model()
    options = {"comlora_k": 2} if start else ALONE
    trainer = trainer_of(given, tmp_path, None if start else lora, **options)
    trainer.train()
    assert not torch.allclose(logits(trainer.model), logits(make_model()), atol=1e-3)
    torch.testing.assert_close(on_a_fresh_base(trainer.args.winner_dir), logits(trainer.model), rtol=0, atol=1e-5)


def test_embeddings_that_are_as_they_were_are_not_written(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    trainer = trainer_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run", {}, comlora_k=2)
    assert not [name for name in trainer.model.snapshot(0).weights if "lora_" not in name]


@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:2], "all-linear"])
def test_what_the_user_wrote_is_adapted_however_narrow(targets, tmp_path):
    narrow = make_model(hidden_size=8, intermediate_size=16)
    expected = {name for name, _ in get_peft_model(narrow, make_lora(target_modules=targets)).named_parameters()}
    trainer = trainer_of(make_model(hidden_size=8, intermediate_size=16), tmp_path, {"target_modules": targets})
    found = {name.replace("branch_0", "default") for name, _ in trainer.model.named_parameters()}
    assert {name for name in found if "lora_" in name and "branch_1" not in name} == {
        n for n in expected if "lora_" in n
    }


def test_a_narrow_model_has_default_targets(tmp_path):
    trainer = trainer_of(make_model(hidden_size=8, intermediate_size=16), tmp_path)
    assert trainer.model.peft_config["branch_0"].target_modules == set(TARGETS)
