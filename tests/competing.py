"""A small model with competing branches, and a step of it as the trainer makes one."""

import torch
from conftest import make_lora, make_model
from reference import Row
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from comlora_trl.competition import CompetitionSettings, mean_nll, pairwise_loss
from comlora_trl.competition.selector import SelectorSettings
from comlora_trl.training.model import BranchPass, ComLoRAModel, CompetitionOutput

TOLERANCE = 1e-9
DEFAULT_SELECTOR = SelectorSettings()


def make_comlora(
    settings: CompetitionSettings,
    selector: SelectorSettings | None = DEFAULT_SELECTOR,
    lora: dict | None = None,
    **overrides: object,
) -> ComLoRAModel:
    """Branches with random B (fresh ones are zero and all alike), and TRL's fused head, ready to train."""
    base = make_model(**overrides).double()
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    torch.manual_seed(2)
    model = ComLoRAModel(base, make_lora(**lora or {}), settings, selector).double()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (".branch_" in name or "bias" in name):
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.train()


def trainable(model: ComLoRAModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def step(
    model: ComLoRAModel, inputs: dict, noise: Tensor, at: float = 0.6, chunk: int | None = None
) -> tuple[Tensor, dict[str, Tensor], CompetitionOutput]:
    """Loss and gradients of one optimizer step, put together as the trainer does."""
    model.zero_grad()
    inputs = {name: value for name, value in inputs.items()}
    output = model(branch_pass=BranchPass(eta=at, chunk=chunk), fused_lm_head=True, use_cache=False, **inputs)
    loss = -output.log_probs.sum() / output.tokens.sum().clamp(min=1)
    if output.scores is not None:
        supervised, settings = output.tokens > 0, model.settings
        racing = model.alive(torch.device("cpu")) & output.nll.isfinite().all(dim=1)
        mean = mean_nll(output.nll, output.tokens)
        noise = torch.cat([noise, noise.new_zeros(len(mean.T) - len(noise), settings.k)])  # rows of mere padding
        pairs = pairwise_loss(output.scores, mean, noise, supervised, supervised.sum(), settings, racing)
        loss = loss + settings.pairwise_weight * pairs
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trainable(model).items()}
    return loss.detach(), gradients, output


def make_noise(rows: list[Row], k: int) -> Tensor:
    return torch.randn(len(rows), k, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def assert_equal(gradients: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert gradients.keys() == expected.keys() and expected
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
