"""LoRA-FA's optimizer over branches is that of each branch alone."""

import copy

import torch
from conftest import make_lora, make_model
from peft import get_peft_model
from peft.optimizers import create_lorafa_optimizer

from comlora_trl.branches.model import BranchModel, branch_name
from comlora_trl.training.lora_fa import pair_branches

K = 3
SETTINGS = {"r": 4, "lora_alpha": 8, "lr": 1e-2, "weight_decay": 0.1}


def test_every_branch_trains_as_alone():
    model = BranchModel(make_model(), make_lora(), K)
    model.train()
    for parameter in model.trainable_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    alone = []
    for branch in range(K):
        plain = get_peft_model(make_model(), make_lora(), adapter_name=branch_name(branch))
        values = dict(model.named_parameters())
        for name, parameter in plain.named_parameters():
            parameter.data.copy_(values[name])
        alone.append((plain, create_lorafa_optimizer(plain, **SETTINGS)))
    optimizer = create_lorafa_optimizer(model, **SETTINGS)
    pair_branches(optimizer)
    names = copy.deepcopy(optimizer.param_groups[0]["names"])
    pair_branches(optimizer)
    assert sorted(name.count("branch_") for name in names if "lora" in name) == [2] * (K * 20)
    for step in range(3):
        gradients = {name: torch.randn_like(p) for name, p in model.named_parameters() if "lora_B" in name}
        for one, own in ((model, optimizer), *alone):
            for name, parameter in one.named_parameters():
                parameter.grad = gradients[name].clone() if name in gradients else None
            own.step()
        for plain, _ in alone:
            values = dict(model.named_parameters())
            for name, parameter in plain.named_parameters():
                assert torch.equal(parameter, values[name]), (step, name)
    assert not torch.equal(
        *(p for n, p in model.named_parameters() if "layers.0.self_attn.q_proj.lora_B" in n and "2" not in n)
    )
