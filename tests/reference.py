"""The method's equations, written out in loops over branches, rows and pairs. Slow, float64, and no code of ours.

The language model runs row by row without any padding, in PEFT's own forward with one active adapter. Equation
numbers are those of *ComLoRA: A Competitive Learning Approach for Enhancing LoRA* (ICLR 2025).
"""

import math
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModelForCausalLM
from torch import Tensor, nn


@dataclass
class Row:
    """One sequence: token ids and labels (-100: not supervised) of equal length."""

    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """m_b, after the shift: the first token is never predicted."""
        return sum(label != -100 for label in self.labels[1:])

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first supervised one; at least the first token."""
        first = next((place for place, label in enumerate(self.labels) if label != -100), len(self.labels))
        return self.input_ids[: max(first, 1)]


@dataclass
class Equations:
    """The settings of eq. 4–9; `alive` holds the branches still in the race."""

    k: int
    top_n: int | None = None
    eta: float = 0.0
    alpha: float = 0.1
    lm_weight: float = 1.0
    alignment_weight: float = 1.0
    pairwise_weight: float = 1.0
    printed: bool = False
    alive: set[int] | None = None

    @property
    def living(self) -> list[int]:
        return [k for k in range(self.k) if self.alive is None or k in self.alive]


@dataclass
class Losses:
    """L_LM, L_align, L_pair and what they were made of."""

    lm: Tensor
    alignment: Tensor
    pairwise: Tensor
    nll: list[list[Tensor]] = field(default_factory=list)
    scores: list[list[Tensor]] = field(default_factory=list)

    @property
    def total(self) -> Tensor:
        """Eq. 10."""
        return self.lm + self.alignment + self.pairwise


def eta(schedule: str, t: int, total: int, gamma: float = 5.0) -> float:
    """η(t), eq. 13–14."""
    return {
        "constant": 1.0,
        "cosine": 0.5 * (1 - math.cos(math.pi * t / total)),
        "exponential": 1 - math.exp(-gamma * t / total),
        "linear": t / total,
    }[schedule]


def probabilities(sim: list[float], equations: Equations) -> list[float]:
    """p[b, ·] of eq. 5: softmax over the top N scores of the living branches, zero elsewhere."""
    ranked = sorted(equations.living, key=lambda k: (-sim[k], k))
    top = ranked[: equations.top_n or equations.k]
    denominator = sum(math.exp(sim[k]) for k in top)
    return [math.exp(sim[k]) / denominator if k in top else 0.0 for k in range(equations.k)]


def log_softmax(values: list[Tensor]) -> list[Tensor]:
    """log(exp(v_i) / Σ_j exp(v_j))."""
    normaliser = torch.log(sum(torch.exp(value) for value in values))
    return [value - normaliser for value in values]


def pairwise_row(sim: list[Tensor], mean_nll: list[float], noise: list[float], equations: Equations) -> Tensor:
    """Eq. 6–9 for one row: the ℓ1 distance of two log-softmaxes over all ordered pairs i ≠ j."""
    noisy = [mean_nll[k] + equations.alpha * noise[k] for k in range(equations.k)]  # eq. 6
    difference, performance = [], []
    for i in equations.living:
        for j in equations.living:
            if i != j:
                difference.append(sim[i] - sim[j])  # eq. 7
                gap = noisy[i] - noisy[j]
                performance.append(torch.tensor(gap if equations.printed else -gap, dtype=torch.float64))
    if not difference:
        return sim[0] * 0
    distance = [a - b for a, b in zip(log_softmax(difference), log_softmax(performance), strict=True)]  # eq. 8
    return sum(value.abs() for value in distance)  # eq. 9


def losses(
    nll: list[list[Tensor]],
    supervised: list[int],
    scores: list[list[Tensor]] | None,
    noise: list[list[float]],
    equations: Equations,
    racing: set[int] | None = None,
) -> Losses:
    """Eq. 4–9 of one optimizer step.

    Args:
        nll: S[k][b].
        supervised: m_b.
        scores: sim[b][k], or None without a selector.
        noise: ε[b][k].
        racing: branches with pairs in eq. 7, where these are fewer than the living ones.
    """
    rows, tokens = range(len(supervised)), max(sum(supervised), 1)
    zero = torch.zeros((), dtype=torch.float64)
    lm = alignment = pairwise = zero
    sign = -1.0 if equations.printed else 1.0
    for k in equations.living:
        for b in rows:
            lm = lm + nll[k][b] / tokens / equations.k  # eq. 4
    if scores is not None:
        for b in rows:
            p = probabilities([score.item() for score in scores[b]], equations)
            for k in equations.living:
                alignment = alignment + sign * equations.eta * p[k] * nll[k][b] / tokens  # eq. 5
        counted = [b for b in rows if supervised[b]]
        pairs = equations if racing is None else Equations(**{**vars(equations), "alive": racing})
        for b in counted:
            mean = [nll[k][b].item() / supervised[b] for k in range(equations.k)]
            pairwise = pairwise + pairwise_row(scores[b], mean, noise[b], pairs) / len(counted)
    return Losses(
        equations.lm_weight * lm,
        equations.alignment_weight * alignment,
        equations.pairwise_weight * pairwise,
        nll,
        [] if scores is None else scores,
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-5) * weight + bias


def selector_scores(embeddings: Tensor, weights: dict[str, Tensor], heads: int) -> list[Tensor]:
    """sim of one row (eq. 1–3): a transformer encoder layer over its tokens [T, d], their mean, dot products with e_k.

    The layer is that of Vaswani et al. (2017), normalised after each residual sum, with ReLU between the two
    feed-forward products. `weights` has the names of the selector's parameters.
    """
    if "projection.weight" in weights:
        embeddings = embeddings @ weights["projection.weight"].T + weights["projection.bias"]
    encoder = {name.removeprefix("encoder."): value for name, value in weights.items()}
    tokens, width = embeddings.shape
    size = width // heads
    mixed = embeddings @ encoder["self_attn.in_proj.weight"].T + encoder["self_attn.in_proj.bias"]
    query, key, value = mixed[:, :width], mixed[:, width : 2 * width], mixed[:, 2 * width :]
    outputs = []
    for t in range(tokens):
        heard = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            attention = torch.exp(key[:, own] @ query[t, own] / math.sqrt(size))
            heard.append((attention / attention.sum()) @ value[:, own])
        attended = encoder["self_attn.out_proj.weight"] @ torch.cat(heard) + encoder["self_attn.out_proj.bias"]
        x = layer_norm(embeddings[t] + attended, encoder["norm1.weight"], encoder["norm1.bias"])
        inner = torch.relu(encoder["linear1.weight"] @ x + encoder["linear1.bias"])
        fed = encoder["linear2.weight"] @ inner + encoder["linear2.bias"]
        outputs.append(layer_norm(x + fed, encoder["norm2.weight"], encoder["norm2.bias"]))
    pooled = sum(outputs) / tokens
    return [pooled @ branch for branch in weights["branch_embeddings.weight"]]


class ReferenceRun:
    """K adapters in a plain PEFT model and the selector's weights, both copied by name from `values`.

    Args:
        base: the base model, its weights equal to those under test, float64.
        lora: the branches' configuration.
        values: trainable values by name; those of the selector begin with "selector.".
    """

    def __init__(self, base: nn.Module, lora: LoraConfig, k: int, values: dict[str, Tensor]) -> None:
        self.embeddings = base.get_input_embeddings().weight.detach().clone()
        self.model = PeftModelForCausalLM(base, lora, adapter_name="branch_0").eval()
        for branch in range(1, k):
            self.model.add_adapter(f"branch_{branch}", lora)
        self.model = self.model.double().eval()
        own = dict(self.model.named_parameters())
        adapters = {name: value for name, value in values.items() if not name.startswith("selector.")}
        assert adapters.keys() == {name for name in own if ".branch_" in name}
        for name, value in adapters.items():
            own[name].data.copy_(value)
        self.adapters = {name: own[name] for name in adapters}
        self.selector = {
            name.removeprefix("selector."): value.detach().clone().requires_grad_()
            for name, value in values.items()
            if name.startswith("selector.")
        }

    def row_nll(self, branch: int, row: Row) -> Tensor:
        """S[k, b]: one row alone, through one adapter."""
        self.model.set_adapter(f"branch_{branch}")
        logits = self.model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0]
        total = torch.zeros((), dtype=torch.float64)
        for place in range(1, len(row.labels)):
            if row.labels[place] != -100:
                total = total - torch.log_softmax(logits[place - 1], dim=-1)[row.labels[place]]
        return total

    def row_scores(self, row: Row, heads: int, prompt_only: bool) -> list[Tensor]:
        """sim[b, ·], from the frozen token embeddings."""
        tokens = row.prompt if prompt_only else row.input_ids
        return selector_scores(self.embeddings[tokens], self.selector, heads)

    def losses(
        self,
        rows: list[Row],
        noise: Tensor,
        equations: Equations,
        heads: int = 8,
        prompt_only: bool = False,
        racing: set[int] | None = None,
    ) -> Losses:
        """Eq. 4–9 of the rows of one optimizer step, `noise` ε[b, k]."""
        nll = [[self.row_nll(branch, row) for row in rows] for branch in range(equations.k)]
        scores = [self.row_scores(row, heads, prompt_only) for row in rows] if self.selector else None
        return losses(nll, [row.supervised for row in rows], scores, noise.tolist(), equations, racing)

    def gradients(self, total: Tensor) -> dict[str, Tensor]:
        """Of every adapter and selector weight, by the name it has in the model under test."""
        named = {**self.adapters, **{f"selector.{name}": value for name, value in self.selector.items()}}
        for parameter in named.values():
            parameter.requires_grad_()
        if not total.requires_grad:
            return {name: torch.zeros_like(value) for name, value in named.items()}
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        return {
            name: torch.zeros_like(value) if gradient is None else gradient
            for (name, value), gradient in zip(named.items(), found, strict=True)
        }
