"""A competition of a small model, one step of which is driven in a plain loop, without a Trainer."""

import torch
from conftest import make_lora, make_model
from reference import Row, eta
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from comlora_trl.competition import CompetitionSettings
from comlora_trl.competition.selector import SelectorSettings
from comlora_trl.training.competition import Competition
from comlora_trl.training.model import ComLoRAModel, CompetitionOutput

TOLERANCE = 1e-9
DEFAULT_SELECTOR = SelectorSettings()
STEP, STEPS = 3, 10
AT = eta("exponential", STEP, STEPS)


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
    model = ComLoRAModel(base, make_lora(**lora or {}), settings.k, selector).double()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (".branch_" in name or "bias" in name):
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.train()


def trainable(model: ComLoRAModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def step(
    model: ComLoRAModel,
    inputs: dict,
    noise: Tensor,
    settings: CompetitionSettings | None = None,
    chunk: int | None = None,
    disqualified: dict[int, int] | None = None,
) -> tuple[Tensor, dict[str, Tensor], CompetitionOutput]:
    """Loss, gradients and output of one micro-batch that is a whole optimizer step, after 3 of 10 steps."""
    competition = Competition(model, settings or CompetitionSettings(k=model.k), chunk=chunk)
    competition.begin(STEPS, STEP)
    competition.state.disqualified = disqualified or {}
    model.zero_grad()
    inputs = dict(inputs)
    plan = competition.plan_step([inputs])
    plan.noise = torch.cat([noise, noise.new_zeros(plan.rows - len(noise), model.k)])  # rows of mere padding
    rows = competition.rows_of(inputs)
    output = model(branch_pass=rows, fused_lm_head=True, use_cache=False, **inputs)
    loss = competition.combine(-output.log_probs.sum() / plan.tokens.clamp(min=1), output)
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trainable(model).items()}
    return loss.detach(), gradients, output


def make_noise(rows: list[Row], k: int) -> Tensor:
    return torch.randn(len(rows), k, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def assert_equal(gradients: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert gradients.keys() == expected.keys() and expected
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
