"""The pure functions of the competition against the equations written out in loops."""

import itertools
import math

import pytest
import reference
import torch
from reference import Equations

from comlora_trl.competition import (
    ANNEALING_SCHEDULES,
    CompetitionSettings,
    annealing,
    mean_nll,
    pairwise_loss,
    pairwise_losses,
    row_weights,
    selection_probabilities,
    step_noise,
    winner,
)
from comlora_trl.competition.rungs import Rung, retired_at

ROWS = 5
CHOICES = [(k, n) for k in range(1, 5) for n in (None, *range(1, k + 1))]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def everyone(k: int) -> torch.Tensor:
    return torch.ones(k, dtype=torch.bool)


def close(actual: torch.Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", ANNEALING_SCHEDULES)
def test_annealing(schedule):
    for done in range(11):
        assert annealing(done / 10, schedule, 3.0) == pytest.approx(reference.eta(schedule, done, 10, 3.0), abs=1e-15)


def test_annealing_by_hand():
    assert annealing(0.5, "cosine") == pytest.approx(0.5)
    assert annealing(0.5) == pytest.approx(0.9179150013761012)  # 1 − e^−2.5
    assert [annealing(0.0, schedule) for schedule in ("constant", "cosine", "exponential", "linear")] == [1, 0, 0, 0]
    assert [annealing(1.0, schedule) for schedule in ("constant", "cosine", "linear")] == [1, 1, 1]
    with pytest.raises(ValueError, match="unknown annealing schedule 'sine': choose one of constant, cosine"):
        annealing(0.5, "sine")


@pytest.mark.parametrize("k, n", CHOICES)
def test_selection_probabilities(k, n):
    scores = draw(ROWS, k).requires_grad_()
    p = selection_probabilities(scores, n)
    close(p, [reference.probabilities(row, Equations(k, n)) for row in scores.tolist()])
    assert not p.requires_grad
    assert (p > 0).sum(dim=1).tolist() == [n or k] * ROWS


def test_selection_probabilities_of_ties_and_disqualified_branches():
    assert (selection_probabilities(torch.zeros(3, 4), 2) > 0).sum(dim=1).tolist() == [2, 2, 2]
    scores = draw(ROWS, 4)
    alive = torch.tensor([True, False, True, True])
    expected = [reference.probabilities(row, Equations(4, 2, alive={0, 2, 3})) for row in scores.tolist()]
    close(selection_probabilities(scores, 2, alive), expected)


@pytest.mark.parametrize("k, n", CHOICES)
@pytest.mark.parametrize("signs", ["as_described", "as_printed"])
def test_row_weights_are_equations_4_and_5(k, n, signs):
    scores, nll, tokens = draw(ROWS, k), draw(k, ROWS, seed=1).exp(), [3, 1, 4, 0, 5]
    nll[:, 3] = 0
    settings = CompetitionSettings(k=k, top_n=n, equation_signs=signs, lm_weight=0.7, alignment_weight=1.3)
    p = selection_probabilities(scores, n)
    weights = row_weights(p, ROWS, 0.4, settings, everyone(k), torch.float64)
    equations = Equations(k, n, 0.4, lm_weight=0.7, alignment_weight=1.3, printed=signs == "as_printed")
    expected = reference.losses(nll, tokens, scores, scores.tolist(), equations)
    close((weights * nll).sum() / sum(tokens), (expected.lm + expected.alignment).item())


def test_row_weights_by_hand():
    p = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    described, printed = (CompetitionSettings(equation_signs=signs) for signs in ("as_described", "as_printed"))
    close(row_weights(p, 1, 1.0, described, everyone(2), torch.float64), [[0.75], [1.25]])
    # With the printed sign and η = 1 the weights of the K branches add up to nothing
    close(row_weights(p, 1, 1.0, printed, everyone(2), torch.float64).sum(), 0.0)
    close(row_weights(None, 1, 1.0, described, everyone(2), torch.float64), [[0.5], [0.5]])
    close(row_weights(p, 1, 0.0, described, torch.tensor([True, False]), torch.float64), [[0.5], [0.0]])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("noise_intensity", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("signs", ["as_described", "as_printed"])
def test_pairwise_losses_and_their_gradient(k, noise_intensity, signs):
    scores, nll, noise = draw(ROWS, k).requires_grad_(), draw(k, ROWS, seed=1).exp(), draw(ROWS, k, seed=2)
    settings = CompetitionSettings(k=k, noise=noise_intensity, equation_signs=signs)
    nll.requires_grad_()
    actual = pairwise_losses(scores, nll, noise, settings, everyone(k))
    equations = Equations(k, alpha=noise_intensity, printed=signs == "as_printed")
    own = scores.detach().clone().requires_grad_()
    rows = [
        reference.pairwise_row(list(own[b]), nll[:, b].tolist(), noise[b].tolist(), equations) for b in range(ROWS)
    ]
    close(actual.detach(), [row.item() for row in rows])
    weights = draw(ROWS, seed=3)
    (expected,) = torch.autograd.grad(sum(w * row for w, row in zip(weights, rows, strict=True)), own)
    found, of_losses = torch.autograd.grad((weights * actual).sum(), [scores, nll], allow_unused=True)
    close(found, expected)
    assert of_losses is None
    assert (actual > 0).all() == (k > 1)


def test_pairwise_loss_of_two_branches_by_hand():
    # Δsim = (1, −1), Δperf = (2, −2): |ln σ(2) − ln σ(4)| + |ln σ(−2) − ln σ(−4)|
    scores, nll = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[1.0], [3.0]]).double()
    settings = CompetitionSettings(noise=0.0)
    log_sigma = lambda x: -math.log1p(math.exp(-x))
    expected = abs(log_sigma(2) - log_sigma(4)) + abs(log_sigma(-2) - log_sigma(-4))
    close(pairwise_losses(scores, nll, torch.zeros(1, 2), settings, everyone(2)), [expected])


@pytest.mark.parametrize("signs, better_rises", [("as_described", True), ("as_printed", False)])
def test_scores_follow_performance_or_as_printed_the_loss(signs, better_rises):
    nll = torch.tensor([[1.0], [2.0], [4.0]]).double()
    settings = CompetitionSettings(k=3, noise=0.0, equation_signs=signs)
    ideal = (-nll if better_rises else nll).T
    close(pairwise_losses(ideal + 7, nll, torch.zeros(1, 3), settings, everyone(3)), [0.0])
    scores = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    pairwise_losses(scores, nll, torch.zeros(1, 3), settings, everyone(3)).sum().backward()
    assert (scores.grad[0, 0] < scores.grad[0, 2]) == better_rises  # descent raises the score with the lower gradient


@pytest.mark.parametrize("lost", [math.nan, math.inf, 3.0])
def test_pairs_with_a_lost_branch_are_left_out(lost):
    scores, nll, noise = draw(ROWS, 3).requires_grad_(), draw(3, ROWS, seed=1).exp(), draw(ROWS, 3, seed=2)
    nll[1] = lost
    alive = torch.tensor([True, False, True])
    actual = pairwise_losses(scores, nll, noise, CompetitionSettings(k=3), alive)
    others = [0, 2]
    expected = pairwise_losses(scores[:, others], nll[others], noise[:, others], CompetitionSettings(k=2), everyone(2))
    close(actual.detach(), expected.detach())
    (gradient,) = torch.autograd.grad(actual.sum(), scores)
    assert gradient.isfinite().all() and gradient[:, 1].abs().max() == 0 and gradient[:, 0].abs().max() > 0
    alone = torch.tensor([True, False, False])
    assert pairwise_losses(scores, nll, noise, CompetitionSettings(k=3), alone).tolist() == [0.0] * ROWS


def test_pairwise_loss_is_the_mean_over_supervised_rows_however_the_step_is_cut():
    scores, nll, noise = draw(ROWS, 3), draw(3, ROWS, seed=1).exp(), draw(ROWS, 3, seed=2)
    supervised = torch.tensor([True, False, True, True, False])
    settings = CompetitionSettings(k=3)
    each = pairwise_losses(scores, nll, noise, settings, everyone(3))
    parts = [
        pairwise_loss(scores[cut], nll[:, cut], noise[cut], supervised[cut], 3, settings, everyone(3))
        for cut in (slice(0, 2), slice(2, 5))
    ]
    close(sum(parts), each[supervised].mean().item())
    nothing = pairwise_loss(scores, nll, noise, torch.zeros(ROWS, dtype=torch.bool), 0, settings, everyone(3))
    assert nothing.item() == 0.0


def test_mean_nll_of_a_row_without_supervised_tokens_is_zero():
    close(mean_nll(torch.tensor([[6.0, 0.0], [3.0, 0.0]]).double(), torch.tensor([3, 0])), [[2.0, 0.0], [1.0, 0.0]])


def test_step_noise_depends_on_seed_and_step_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = step_noise(1, 2, 6, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    assert torch.equal(step_noise(1, 2, 6, 3), first)
    assert not torch.equal(step_noise(1, 3, 6, 3), first) and not torch.equal(step_noise(2, 2, 6, 3), first)
    many = step_noise(0, 0, 20_000, 2)
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02
    assert abs((many[:, 0] * many[:, 1]).mean()) < 0.02  # drawn per (k, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_winner(dtype):
    values = torch.tensor([1.0, 3.0, 3.0, -2.0], dtype=dtype)
    assert winner(values, everyone(4)) == 1  # ties go to the lowest index
    assert winner(values, everyone(4), highest=False) == 3
    assert winner(values, torch.tensor([True, False, True, True])) == 2
    assert winner(torch.tensor([0.0, math.nan, math.inf]), everyone(3)) == 0
    assert winner(torch.tensor([math.nan, math.nan]), torch.tensor([False, True])) == 1
    with pytest.raises(RuntimeError, match="every branch is disqualified"):
        winner(values, torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize("highest", [True, False])
def test_a_rung_never_retires_the_branch_that_a_selection_chooses(highest):
    """Every combination of two values, nan and a branch that is out, with any losses as ties."""
    for values in itertools.product([0.5, 1.0, math.nan, None], repeat=3):
        alive = [value is not None for value in values]
        if sum(alive) < 2:
            continue
        for losses in itertools.product([0.5, math.nan, math.inf], repeat=3):
            ties = [loss if lives else None for loss, lives in zip(losses, alive, strict=True)]
            numbers = torch.tensor([0.0 if value is None else value for value in values])
            chosen = winner(numbers, torch.tensor(alive), highest, torch.tensor(losses))
            assert chosen not in retired_at(Rung(0.5, 1), values, highest, ties), (values, ties)
