"""The K-branch LoRA products against a float64 loop over the branches; Triton's, on a CPU, in its interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CAN_RUN_TRITON, HAS_TRITON, INTERPRETED
from kernel_cases import (
    DEVICE,
    TOLERANCE,
    assert_close,
    delta_linear,
    drawn_masks,
    fused_linear,
    literal,
    make_case,
    ours,
)
from torch import Tensor
from torch.nn import functional as F

from comlora_trl.branches.kernels import selected_kernels
from comlora_trl.branches.kernels.branches import products

# k, rows a branch, tokens, d, l, r: odd counts, ranks that are no multiple of 8, one row, no rows
SHAPES = [
    (4, 2, 9, 64, 96, 8),
    (3, 5, 7, 40, 33, 3),
    (1, 3, 11, 130, 70, 4),
    (2, 1, 1, 24, 16, 5),
    (2, 13, 17, 72, 200, 20),
    (2, 0, 4, 16, 8, 2),
]


# Compiled layers have no fused product: the compiler makes its own
PATHS = [
    (path, dropout, fused)
    for path, ways in {"torch": (False, True), "triton": (False, True), "traced": (False,)}.items()
    for dropout in (0.0, 0.3)
    for fused in ways
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("path", "dropout", "fused"), PATHS, indirect=["path"], ids=str)
def test_matches_branch_by_branch_in_float64(
    path: str, dropout: float, shape: tuple, dtype: torch.dtype, fused: bool
) -> None:
    case = make_case(shape, dtype)
    mask = None
    if dropout:
        torch.manual_seed(3)
        [mask] = drawn_masks(case["x"], dtype, dropout)
        assert not mask.numel() or (mask == 0).any()
    torch.manual_seed(3)
    assert_close(ours(case, 1.7, dropout, fused), literal(case, 1.7, mask), TOLERANCE[dtype])


def test_dropout_masks_differ_and_keep_their_share(path: str) -> None:
    x, identity = torch.ones(256, 64, device=DEVICE), torch.eye(64, device=DEVICE)[None]
    kernels = products(x, identity, 0.05)
    first, second = (kernels.project_down(x, identity, kernels.draw_noise(x, 0.05, 1))[0] for _ in range(2))
    assert not torch.equal(first, second)
    for mask in (first, second):
        assert abs((mask == 0).double().mean() - 0.05) < 0.01
        torch.testing.assert_close(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / 0.95))
        # neither rows nor columns agree with their neighbours more than chance has it
        for neighbours in ((mask[1:] == 0) & (mask[:-1] == 0), (mask[:, 1:] == 0) & (mask[:, :-1] == 0)):
            assert abs(neighbours.double().mean() - 0.05**2) < 0.0025


def test_one_branch_drops_what_torch_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMLORA_KERNELS", "torch")
    case = make_case((1, 3, 5, 16, 12, 4), torch.float32)
    torch.manual_seed(0)
    found = ours(case, 2.0, 0.5, fused=True)[0]
    torch.manual_seed(0)
    x = F.dropout(case["x"], 0.5)
    expected = F.linear(case["x"], case["weight"], case["bias"]) + (x @ case["a"][0].T @ case["b"][0].T) * 2.0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_gradcheck() -> None:
    case = make_case((2, 2, 3, 5, 4, 2), torch.float64)
    x, ab = case["x"].requires_grad_(), [*case["a"], *case["b"]]
    fused = lambda x, *ab: fused_linear(x, case["weight"], None, ab[:2], ab[2:], 0.7)
    delta = lambda x, *ab: delta_linear(x, F.linear(x, case["weight"]), ab[:2], ab[2:], 0.7)
    assert torch.autograd.gradcheck(fused, (x, *ab))
    assert torch.autograd.gradcheck(delta, (x, *ab))


@pytest.mark.parametrize(("path", "dropout", "fused"), PATHS, indirect=["path"], ids=str)
def test_non_contiguous_input_and_gradient(path: str, dropout: float, fused: bool) -> None:
    case = make_case((2, 3, 8, 32, 48, 8), torch.float32)
    torch.manual_seed(3)
    expected = ours(case, 1.0, dropout, fused)
    for name in ("x", "grad"):
        case[name] = case[name].transpose(0, 1).contiguous().transpose(0, 1)
        assert not case[name].is_contiguous()
    torch.manual_seed(3)
    assert_close(ours(case, 1.0, dropout, fused), [t.double() for t in expected], 1e-6)


def test_input_without_gradient_and_no_grad() -> None:
    case = make_case(SHAPES[0], torch.float32)
    expected = ours(case, 1.0, 0.0, fused=True)
    output = fused_linear(case["x"], case["weight"], case["bias"], case["a"], case["b"], 1.0)
    gradients = torch.autograd.grad(output, [*case["a"], *case["b"]], case["grad"])
    assert_close([output, *gradients], [expected[0].double(), *(t.double() for t in expected[2:])], 1e-6)
    with torch.no_grad():
        again = fused_linear(case["x"], case["weight"], case["bias"], case["a"], case["b"], 1.0)
    torch.testing.assert_close(again, output)


def test_autocast_computes_in_its_dtype_and_keeps_master_gradients() -> None:
    case = make_case(SHAPES[0], torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = ours({**case, "grad": case["grad"].bfloat16()}, 1.0, 0.0, fused=True)
    assert found[0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in found[1:])
    assert_close(found, literal(case, 1.0), 2e-2)


def test_checkpointing_gives_the_same_gradients_with_dropout(path: str) -> None:
    case = make_case(SHAPES[0], torch.float32)
    run = lambda x: fused_linear(x, case["weight"], None, case["a"], case["b"], 1.0, 0.4)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        x = case["x"].detach().requires_grad_()
        output = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
        results.append(torch.autograd.grad(output, [x, *case["a"], *case["b"]], case["grad"]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_base_output_that_others_hold_is_left_alone() -> None:
    case = make_case((2, 1, 3, 8, 6, 2), torch.float32)
    leaf = torch.zeros(2, 3, 6, device=DEVICE, requires_grad=True)
    delta_linear(case["x"], leaf, case["a"], case["b"], 1.0)
    assert not leaf.any()


def test_saves_one_reference_to_the_input() -> None:
    case = make_case((2, 8, 16, 64, 64, 4), torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_linear(case["x"], case["weight"], None, case["a"], case["b"], 1.0)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    x, small = case["x"], 2 * 8 * 16 * 4 + 2 * 4 * (64 + 64)  # x Aᵀ, and the stacked A and B
    assert x.untyped_storage().data_ptr() in storages
    assert sum(storages.values()) == 4 * (x.numel() + small)


def test_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMLORA_KERNELS", raising=False)
    assert selected_kernels("cpu", 0.1) == "torch"
    assert selected_kernels("cuda", 0.0) == "torch"
    assert selected_kernels("cuda", 0.1) == ("triton" if HAS_TRITON else "torch")
    monkeypatch.setenv("COMLORA_KERNELS", "torch")
    assert selected_kernels("cuda", 0.1) == "torch"
    if HAS_TRITON:
        monkeypatch.setenv("COMLORA_KERNELS", "triton")
        assert selected_kernels("cuda", 0.0) == "triton"
    monkeypatch.setenv("COMLORA_KERNELS", "fast")
    with pytest.raises(ValueError, match="COMLORA_KERNELS=fast is not possible: it must be torch or triton"):
        selected_kernels("cpu", 0.1)
    if not CAN_RUN_TRITON:
        monkeypatch.setenv("COMLORA_KERNELS", "triton")
        with pytest.raises(ValueError, match="COMLORA_KERNELS=triton is not possible"):
            selected_kernels("cpu", 0.1)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda" or not HAS_TRITON, reason="triton's own run, or no triton")
def test_triton_kernels_in_the_interpreter() -> None:
    """The tests of this folder again with Triton's interpreter, to be chosen before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "passed" in result.stdout
