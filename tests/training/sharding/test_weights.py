"""Whole values of sharded weights, in one process."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from comlora_trl.training.sharding import whole_state


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_weights_are_whole_and_exact_after_a_forward_in_lower_precision(one_process):
    """The forward of an evaluation leaves gathered copies in bfloat16 behind, which are not the weights."""
    model = nn.Linear(4, 4)
    trained = {name: value.detach().clone() for name, value in model.named_parameters()}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mesh=one_process, mp_policy=policy, reshard_after_forward=False)
    with torch.no_grad():
        model(torch.ones(1, 4))
    state = whole_state(model, model)
    assert {name: value.dtype for name, value in state.items()} == dict.fromkeys(trained, torch.float32)
    assert all(torch.equal(state[name], value) for name, value in trained.items())
