"""The selector of ComLoRA (eq. 1–3): one transformer encoder layer that scores every branch for every row.

It reads the frozen base model's token embeddings, so its scores are known before the language model runs. It trains
by the pairwise loss alone, is not used at inference and is not exported with the winner.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

SELECTOR_INPUTS = ("sequence", "prompt")


@dataclass(frozen=True)
class SelectorSettings:
    """Size and input of the selector.

    Attributes:
        dim: d_sel, None for the embedding width d.
        ffn_dim: width of the feed-forward layer, None for 1.5·d_sel.
        heads: attention heads; must divide d_sel.
        input: "sequence" (prompt and completion) or "prompt".
    """

    dim: int | None = None
    ffn_dim: int | None = None
    heads: int = 8
    input: str = "sequence"


class Selector(nn.Module):
    """Scores K branches for each row: encoder layer, mean over real tokens, dot product with e_k.

    Args:
        embedding_dim: d, width of the base model's token embeddings.
        k: branches.
        settings: sizes, see [`SelectorSettings`].

    Raises:
        ValueError: if the heads do not divide d_sel.
    """

    def __init__(self, embedding_dim: int, k: int, settings: SelectorSettings | None = None) -> None:
        super().__init__()
        settings = settings or SelectorSettings()
        dim = settings.dim or embedding_dim
        ffn_dim = settings.ffn_dim or int(1.5 * dim)
        if dim % settings.heads:
            raise ValueError(
                f"comlora_selector_heads={settings.heads} does not divide the selector's width {dim}: choose a "
                f"divisor of {dim}, or another comlora_selector_dim."
            )
        self.projection = nn.Linear(embedding_dim, dim) if dim != embedding_dim else nn.Identity()
        self.encoder = EncoderLayer(dim, settings.heads, ffn_dim)
        # e_k, a line each
        self.branch_embeddings = skip_init(nn.Linear, dim, k, bias=False, device=torch.get_default_device())
        # The encoder ends in a layer norm, so a pooled row has a norm of up to √d: scores start near unit size
        nn.init.normal_(self.branch_embeddings.weight, std=dim**-0.5)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Scores sim (eq. 3).

        Args:
            embeddings: token embeddings, [R, T, d].
            mask: bool [R, T], True on the tokens to read; padding does not leak into a row's scores.

        Returns:
            [R, K]
        """
        hidden = self.projection(embeddings.detach().to(next(self.parameters()).dtype))
        # A row without a token would attend to nothing and become nan, so it reads its first position
        readable = mask | (~mask.any(dim=-1, keepdim=True) & (torch.arange(mask.size(-1), device=mask.device) == 0))
        hidden = self.encoder(hidden, readable)
        weight = readable.unsqueeze(-1).to(hidden.dtype)
        # The encoder's output at padding positions is arbitrary: select, do not multiply
        hidden = torch.where(readable.unsqueeze(-1), hidden, torch.zeros_like(hidden))
        pooled = hidden.sum(dim=1) / weight.sum(dim=1)
        return self.branch_embeddings(pooled)


class EncoderLayer(nn.Module):
    """`nn.TransformerEncoderLayer` without dropout: the same numbers and, if the random state is, the same weights.

    Dropout would make a row's scores depend on the batch it came in, and they must not. Every weight lies in a module
    that is called: sharding (FSDP1, ZeRO-3) gathers weights where their module is called, and PyTorch's attention
    reads those of its output projection without.

    Args:
        dim: width.
        heads: attention heads.
        ffn_dim: width between the two feed-forward products.
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, heads)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm1, self.norm2 = Norm(dim), Norm(dim)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[R, T, d] to [R, T, d]; `mask` bool [R, T] is True on the tokens that are attended to."""
        hidden = self.norm1(hidden + self.self_attn(hidden, mask))
        return self.norm2(hidden + self.linear2(functional.relu(self.linear1(hidden))))


class Norm(nn.LayerNorm):
    """A layer norm that takes any input: FSDP's mixed precision casts a module's weights, and not what it is given."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] to [..., d], in the weights' type."""
        return super().forward(hidden.to(self.weight.dtype))


class SelfAttention(nn.Module):
    """Multi-head self-attention, as `nn.MultiheadAttention` computes and initialises it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = skip_init(nn.Linear, dim, 3 * dim, device=torch.get_default_device())
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj.weight)
        for bias in (self.in_proj.bias, self.out_proj.bias):
            nn.init.zeros_(bias)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """See [`EncoderLayer`]."""
        rows, tokens, dim = hidden.shape
        split = self.in_proj(hidden).view(rows, tokens, 3, self.heads, dim // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        heard = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return self.out_proj(heard.transpose(1, 2).reshape(rows, tokens, dim))
