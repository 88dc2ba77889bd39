"""A view is a model with one branch: its outputs, loss and gradients are those of PEFT's model with that adapter."""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import collate, make_lora, make_model, make_rows
from peft import PeftModelForCausalLM
from plain_loop import make_comlora, trainable
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from comlora_trl.branches.passes import INPUTS, LAYERS, PLACES, SEPARATELY
from comlora_trl.branches.views import BranchViews, branch_losses
from comlora_trl.competition import CompetitionSettings
from comlora_trl.training.model import ComLoRAModel

K = 3
HEAD = ("log_probs", "entropy", "is_top1")


def make_branches(**lora: object) -> ComLoRAModel:
    return make_comlora(CompetitionSettings(k=K), None, lora)


def make_experts() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 128, "router_aux_loss_coef": 0.3}
    config = MixtralConfig(**sizes, output_router_logits=True, pad_token_id=0, experts_implementation="eager")
    return MixtralForCausalLM(config).double()


def alone(base: PreTrainedModel, model: ComLoRAModel, branch: int, **lora: object) -> PeftModelForCausalLM:
    """PEFT's own model with one adapter, whose weights are a branch's."""
    add_fused_lm_head(base, outputs=HEAD)
    plain = PeftModelForCausalLM(base, make_lora(**lora)).double().train()
    values = {name.replace(f"branch_{branch}", "default"): value for name, value in trainable(model).items()}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(values[name])
    return plain


def gradients_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and f".{name}." in f"{n}."}
    return {own.replace(f".{name}", ""): gradient for own, gradient in found.items()}


def cross_entropy(model: nn.Module, inputs: dict) -> Tensor:
    labels = inputs.pop("labels")
    logits = model(**inputs).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def the_models_own(model: nn.Module, inputs: dict) -> Tensor:
    return model(**inputs).loss


def the_models_own_normalised(model: nn.Module, inputs: dict) -> Tensor:
    return model(**inputs, num_items_in_batch=torch.tensor(31), return_dict=False)[0]


def fused(model: nn.Module, inputs: dict) -> Tensor:
    output = model(**inputs, fused_lm_head=True)
    assert output.is_top1.shape == output.label_mask.shape == output.log_probs.shape == output.entropy.shape
    return output.loss - (output.log_probs.exp().detach() * output.log_probs).sum() / output.label_mask.sum()


def hidden(model: nn.Module, inputs: dict) -> Tensor:
    output = model(inputs.pop("input_ids"), **inputs, output_hidden_states=True)
    layers = torch.stack(output.hidden_states)  # all layers' of one size, the widened ones among them
    return layers.square().mean() + output.logits.logsumexp(-1).mean()


def two_forwards(model: nn.Module, inputs: dict) -> Tensor:
    """As R-Drop does, or a pair of prompts one after the other."""
    first = model(**inputs).loss
    inputs["input_ids"] = inputs["input_ids"].flip(0)
    return first + 2 * model(**inputs).loss


def with_a_reference(model: nn.Module, inputs: dict) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        reference = model(**inputs)
    output = model(**inputs)
    gap = nn.functional.kl_div(output.logits.log_softmax(-1), reference.logits.log_softmax(-1), log_target=True)
    return gap + (output.loss - reference.loss).sigmoid()


def masked_at_random(model: nn.Module, inputs: dict) -> Tensor:
    """Other tokens for each view: no pass is theirs together."""
    ids = inputs.pop("input_ids")
    seed = int(1e6 * sum(p.detach().abs().sum() for p in own_parameters(model))) % 1000
    keep = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) > 0.3
    return model(input_ids=ids * keep, **inputs).loss


def own_parameters(model: nn.Module) -> list[Tensor]:
    branch = getattr(model, "branch", None)
    return [p for n, p in model.named_parameters() if ("default" if branch is None else f"branch_{branch}") in n]


LOSSES: list[Callable] = [
    cross_entropy,
    the_models_own,
    the_models_own_normalised,
    fused,
    hidden,
    two_forwards,
    with_a_reference,
    masked_at_random,
]


def check(
    model: ComLoRAModel, make_base: Callable, batch: dict, loss_of: Callable, chunk: int | None = None, **lora: object
) -> int:
    """Losses and gradients of all views, summed up with weights, against those of K models with one adapter."""
    model.zero_grad()
    tolerance = 1e-9 if loss_of in (cross_entropy, fused, hidden) else 2e-7  # transformers' loss is in float32
    views = lambda branches: BranchViews(model, branches, batch)
    losses, passes = branch_losses(views, range(K), lambda view: loss_of(view, view.inputs), model, chunk)
    sum((1 + branch) * loss for branch, loss in losses.items()).backward()
    assert model.competing.current() is None
    for branch in range(K):
        plain = alone(make_base(), model, branch, **lora)
        expected = loss_of(plain, {**batch, "use_cache": False})  # with a cache packed rows see each other
        ((1 + branch) * expected).backward()
        assert losses[branch].item() == pytest.approx(expected.item(), abs=1e-6)
        found, wanted = gradients_of(model, f"branch_{branch}"), gradients_of(plain, "default")
        assert found.keys() == wanted.keys() and max(value.abs().max() for value in wanted.values()) > 1e-4
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)
    return passes


def make_double() -> PreTrainedModel:
    return make_model().double()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("loss_of", LOSSES, ids=lambda function: function.__name__)
def test_a_view_is_the_branch_alone(loss_of, place, checkpointing, float64):
    lora = {"layers_to_transform": [1]} if place == LAYERS else {}
    model = make_branches(**lora)
    model.expansion.place = place
    batch = collate(make_rows())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if loss_of is masked_at_random and place != SEPARATELY:
            with pytest.raises(RuntimeError, match="gradient checkpointing"):
                check(model, make_double, batch, loss_of, **lora)
            model.competing.abandon()
            check(model, make_double, batch, loss_of, 1, **lora)
            return
    passes = check(model, make_double, batch, loss_of, **lora)
    assert passes >= K * (2 if loss_of is two_forwards else 1)
    if loss_of is not masked_at_random:
        assert passes == K * (2 if loss_of is two_forwards else 1)


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("loss_of", [cross_entropy, the_models_own, fused, with_a_reference])
def test_in_chunks(loss_of, chunk, float64):
    model = make_branches()
    check(model, make_double, collate(make_rows()), loss_of, chunk)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check(model, make_double, collate(make_rows()), loss_of, chunk)


@pytest.mark.parametrize("place", [LAYERS, INPUTS])
@pytest.mark.parametrize("loss_of", [cross_entropy, the_models_own, fused, hidden])
def test_packed_batches(loss_of, place, float64):
    model = make_branches(layers_to_transform=[1])
    model.expansion.place = place
    check(model, make_double, collate(make_rows(), packed=True), loss_of, layers_to_transform=[1])


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("loss_of", [cross_entropy, the_models_own, fused])
def test_other_kinds_of_adapters(loss_of, chunk, float64):
    lora = {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}
    model = make_branches(**lora)
    model.expansion.place = INPUTS
    check(model, make_double, collate(make_rows()), loss_of, chunk, **lora)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("loss_of", [the_models_own, fused])
def test_a_mixture_of_experts(loss_of, place):
    """Each branch's loss has the load-balancing loss of its own tokens."""
    base = make_experts()
    add_fused_lm_head(base, outputs=HEAD)
    lora = {"target_modules": ["q_proj", "v_proj"]}
    model = ComLoRAModel(base, make_lora(**lora), K).double().train()
    for parameter in model.trainable_parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.expansion.place = place

    def loss(one: nn.Module, inputs: dict) -> Tensor:
        output = one(**inputs, **({"fused_lm_head": True} if loss_of is fused else {}))
        return output.loss + 0.1 * output.aux_loss

    views = lambda branches: BranchViews(model, branches, collate(make_rows()))
    losses, _ = branch_losses(views, range(K), lambda view: loss(view, view.inputs), model)
    sum(losses.values()).backward()
    for branch in range(K):
        plain = alone(make_experts(), model, branch, **lora)
        expected = loss(plain, collate(make_rows()))
        expected.backward()
        assert losses[branch].item() == pytest.approx(expected.item(), abs=1e-6)
        wanted = gradients_of(plain, "default")
        for name, value in gradients_of(model, f"branch_{branch}").items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=2e-7)  # TRL's head and norms are float32


def test_a_loss_of_the_models_own_making(float64):
    """Custom code that does not go through transformers' loss function: each branch runs by itself."""

    class Own(type(make_model())):
        def forward(self, *args, labels=None, **kwargs):
            output = super().forward(*args, **kwargs)
            if labels is not None:
                shifted = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
                output.loss = 3 * nn.functional.cross_entropy(*shifted, ignore_index=-100)
            return output

    def make_own() -> PreTrainedModel:
        base = make_double()
        base.__class__ = Own
        return base

    base = make_own()
    torch.manual_seed(2)
    add_fused_lm_head(base, outputs=HEAD)
    model = ComLoRAModel(base, make_lora(), K).double().train()
    for parameter in model.trainable_parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    for _ in range(2):
        assert check(model, make_own, collate(make_rows()), the_models_own) == K
    assert check(model, make_own, collate(make_rows()), cross_entropy) == K
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check(model, make_own, collate(make_rows()), the_models_own, 1)
    with pytest.raises(RuntimeError, match="comlora_branch_chunk=1"):
        check(model, make_own, collate(make_rows()), the_models_own)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_dealt_rows(packed, chunk, checkpointing, float64):
    """Unequal shares, and a branch without any line: each view sees its own lines, as a batch of their own."""
    rows, owners = make_rows(()), (2, 0, 2, 2)
    model = make_branches()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collate(rows, packed)
    for loss_of in (cross_entropy, the_models_own, fused):
        model.zero_grad()
        views = lambda branches: BranchViews(model, branches, batch, owners=owners)
        losses, passes = branch_losses(views, range(K), lambda view, f=loss_of: f(view, view.inputs), model, chunk)
        sum(losses.values()).backward()
        assert losses.keys() == {0, 2} and passes == 2
        for branch in losses:
            plain = alone(make_double(), model, branch)
            own = [row for row, owner in zip(rows, owners, strict=True) if owner == branch]
            expected = loss_of(plain, {**collate(own, packed), "use_cache": False})
            expected.backward()
            assert losses[branch].item() == pytest.approx(expected.item(), abs=1e-9)
            wanted = gradients_of(plain, "default")
            for name, value in gradients_of(model, f"branch_{branch}").items():
                torch.testing.assert_close(value, wanted[name], rtol=0, atol=2e-8)


def test_dealt_rows_that_a_caller_changes(float64):
    """New tensors made of a view's lines: it runs by itself."""
    rows, owners = make_rows(()), (2, 0, 2, 2)
    model = make_branches()
    views = BranchViews(model, range(K), collate(rows), owners=owners)
    for view in views:
        inputs = view.inputs
        loss = the_models_own(view, {name: value.clone() for name, value in inputs.items()})
        plain = alone(make_double(), model, view.branch)
        assert loss.item() == pytest.approx(the_models_own(plain, inputs).item(), abs=1e-9)


def test_one_pass_serves_all_views_once():
    model, batch, calls = make_branches(), collate(make_rows()), []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    views = BranchViews(model, [0, 2], batch)
    outputs = [view(**view.inputs) for view in views]
    assert len(calls) == 1 and views.passes == 2
    assert outputs[0].logits.shape == outputs[1].logits.shape == (4, 12, 128)
    assert not torch.equal(outputs[0].logits, outputs[1].logits)
    again = [view(**view.inputs) for view in views]
    assert len(calls) == 2 and torch.equal(again[1].logits, outputs[1].logits)
    with torch.no_grad():
        quiet = [view(**{**view.inputs, "labels": None}) for view in views]
    assert len(calls) == 3 and views.passes == 4 and quiet[0].loss is None


def test_a_view_is_the_model_in_all_else():
    model = make_branches()
    view = BranchViews(model, range(K), collate(make_rows()))[1]
    assert isinstance(view, ComLoRAModel) and isinstance(view, PeftModelForCausalLM) and isinstance(view, nn.Module)
    assert view.config is model.config and view.training and view.peft_config is model.peft_config
    assert [*view.parameters()] == [*model.parameters()] or all(
        a is b for a, b in zip(view.parameters(), model.parameters(), strict=True)
    )
    with pytest.raises(AttributeError):
        _ = view.nothing
    ids = torch.tensor([[5, 6, 7]])
    model.eval()
    written = view.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert model.active_adapter == "branch_0"
    model.set_adapter("branch_1")
    assert torch.equal(written, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False))


def test_a_cache_is_refused():
    model = make_branches()
    view = BranchViews(model, range(K), collate(make_rows()))[0]
    with pytest.raises(ValueError, match="without a cache"):
        view(**view.inputs, use_cache=True)


def test_a_reference_adapter_answers_for_all():
    model = make_branches()
    reference = copy.deepcopy(make_lora())
    model.add_adapter("reference", reference)
    batch = collate(make_rows())
    model.set_adapter("reference")
    outputs = [view(**view.inputs).logits for view in BranchViews(model, range(K), batch)]
    expected = model(**batch).logits
    model.set_adapter("branch_0")
    assert all(torch.equal(one, expected) for one in outputs)
