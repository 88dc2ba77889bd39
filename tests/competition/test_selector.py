"""The selector against its formulae (eq. 1–3), and what must not reach its scores."""

import copy

import pytest
import reference
import torch
from torch import nn

from comlora_trl.competition.selector import EncoderLayer, Selector, SelectorSettings

WIDTH, K = 16, 3
SIZES = {
    "default": SelectorSettings(),
    "narrow": SelectorSettings(dim=12, heads=3),
    "wide": SelectorSettings(dim=24, ffn_dim=10, heads=2),
    "one_head": SelectorSettings(heads=1),
}


def make_selector(settings: SelectorSettings | None = None, seed: int = 0) -> Selector:
    """All weights random: fresh biases are zero and norms' weights one, which would hide them from a comparison."""
    torch.manual_seed(seed)
    selector = Selector(WIDTH, K, settings).double()
    for parameter in selector.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return selector


def make_batch(lengths: list[int], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = torch.randn(len(lengths), longest, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    return embeddings, torch.arange(longest) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("name", SIZES)
def test_scores_and_gradients_are_the_formulae(name):
    settings, lengths = SIZES[name], [5, 1, 7, 3]
    selector = make_selector(settings)
    embeddings, mask = make_batch(lengths, 9)
    scores = selector(embeddings, mask)
    weights = {name: value.detach().clone().requires_grad_() for name, value in selector.named_parameters()}
    rows = [
        torch.stack(reference.selector_scores(embeddings[b, :length], weights, settings.heads))
        for b, length in enumerate(lengths)
    ]
    torch.testing.assert_close(scores, torch.stack(rows), rtol=0, atol=1e-11)

    target = torch.randn(len(lengths), K, generator=torch.Generator().manual_seed(2)).double()
    found = torch.autograd.grad((scores * target).sum(), list(selector.parameters()))
    expected = torch.autograd.grad((torch.stack(rows) * target).sum(), list(weights.values()))
    for name, mine, theirs in zip(weights, found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_encoder_layer_is_pytorchs():
    torch.manual_seed(0)
    mine = EncoderLayer(WIDTH, 4, 24)
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(WIDTH, 4, 24, dropout=0.0, batch_first=True)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    embeddings, mask = make_batch([5, 1, 7], 7)
    expected = theirs.double()(embeddings, src_key_padding_mask=~mask)
    torch.testing.assert_close(mine.double()(embeddings, mask)[mask], expected[mask], rtol=0, atol=1e-13)


@pytest.mark.parametrize("training", [True, False])
def test_padding_does_not_leak_into_the_scores(training):
    selector = make_selector().train(training)
    embeddings, mask = make_batch([5, 1, 7], 7)
    scores = selector(embeddings, mask)
    filler = torch.full((3, 6, WIDTH), 1e6, dtype=torch.float64)
    wider = torch.cat([torch.where(mask[..., None], embeddings, filler[:, :1]), filler], dim=1)
    wider_mask = torch.cat([mask, torch.zeros(3, 6, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(selector(wider, wider_mask), scores, rtol=0, atol=1e-12)
    torch.testing.assert_close(selector(embeddings[1:2, :1], mask[1:2, :1]), scores[1:2], rtol=0, atol=1e-12)
    moved = selector(embeddings + (torch.arange(7) == 3)[:, None], mask)
    assert (moved[[0, 2]] - scores[[0, 2]]).abs().min() > 1e-6 and torch.equal(moved[1], scores[1])


def test_training_draws_nothing_at_random():
    selector = make_selector().train()
    batch = make_batch([5, 1, 7], 7)
    assert torch.equal(selector(*batch), selector(*batch))


def test_no_gradient_reaches_the_embeddings():
    embeddings, mask = make_batch([3, 2], 3)
    embeddings.requires_grad_()
    selector = make_selector()
    selector(embeddings, mask).sum().backward()
    assert embeddings.grad is None
    assert all(value.grad is not None for value in selector.parameters())


def test_a_row_without_any_token_is_finite():
    embeddings, mask = make_batch([4, 0], 4)
    selector = make_selector()
    scores = selector(embeddings, mask)
    assert scores.isfinite().all()
    scores.sum().backward()
    assert all(value.grad.isfinite().all() for value in selector.parameters())


def test_default_size_is_the_embedding_width_and_one_and_a_half_times_it():
    d, f = WIDTH, 24
    attention, feed_forward, norms = 4 * d * d + 4 * d, 2 * d * f + f + d, 4 * d
    count = sum(value.numel() for value in Selector(WIDTH, K).parameters())
    assert count == attention + feed_forward + norms + K * d


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="comlora_selector_heads=5 does not divide the selector's width 16"):
        Selector(WIDTH, K, SelectorSettings(heads=5))


def test_weights_in_half_precision_score_as_autocast_does():
    """FSDP's mixed precision and DeepSpeed's bf16 hold the selector in bfloat16. Autocast does in one process."""
    torch.manual_seed(0)
    selector = Selector(64, 4, SelectorSettings(heads=4))
    for norm in (selector.encoder.norm1, selector.encoder.norm2):
        nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(selector.branch_embeddings.weight, std=3)  # scores of some 10, as late in training
    embeddings = torch.randn(16, 40, 64)
    mask = torch.ones(16, 40, dtype=torch.bool)
    exact = selector(embeddings, mask)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = selector(embeddings.bfloat16(), mask)
    half = copy.deepcopy(selector).bfloat16()(embeddings.bfloat16(), mask)
    assert autocast.dtype == half.dtype == torch.float32
    assert not torch.equal(half, half.bfloat16().float())  # not rounded at the end
    errors = [(scores - exact).abs().max().item() for scores in (autocast, half)]
    assert errors[0] < 0.01 * exact.abs().max()
    assert errors[1] < 3 * errors[0]  # the dot products' weights are rounded too: 0.048 and 0.025
