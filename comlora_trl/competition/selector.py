"""The selector of ComLoRA (eq. 1–3): one transformer encoder layer that scores every branch for every row.

The selector reads the token embeddings of the frozen base model, so its scores are known before the language model
runs. Only the pairwise loss trains it. It is not used at inference and is not exported with the winner.
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
        dim: width of the selector, d_sel; None for the base model's embedding width d.
        ffn_dim: width of the feed-forward layer; None for 1.5·d_sel.
        heads: number of attention heads; must divide d_sel.
        input: "sequence" (prompt and completion) or "prompt".
    """

    dim: int | None = None
    ffn_dim: int | None = None
    heads: int = 8
    input: str = "sequence"


class Selector(nn.Module):
    """Scores K branches for each row: an encoder layer, the mean over tokens, the dot product with each embedding e_k.

    Args:
        embedding_dim: d, the width of the base model's token embeddings.
        k: number of branches.
        settings: size and input, see [`SelectorSettings`].

    Raises:
        ValueError: if the number of heads does not divide d_sel.
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
        self.projection = Linear(embedding_dim, dim) if dim != embedding_dim else nn.Identity()
        self.encoder = EncoderLayer(dim, settings.heads, ffn_dim)
        # Row k of the weight is e_k
        self.branch_embeddings = skip_init(BranchEmbeddings, dim, k, bias=False, device=torch.get_default_device())
        # The encoder ends with a layer norm, so the norm of a pooled row is at most √d_sel. This standard deviation
        # makes the first scores about 1 in size
        nn.init.normal_(self.branch_embeddings.weight, std=dim**-0.5)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Computes the scores (eq. 3).

        Args:
            embeddings: token embeddings, [R, T, d].
            mask: bool [R, T], True on the tokens to read. Other tokens do not change the scores.

        Returns:
            sim, [R, K], in float32 or higher.
        """
        hidden = wide(self.projection(wide(embeddings.detach())))
        # Attention over no token gives nan, so a row without tokens to read reads its first position
        readable = mask | (~mask.any(dim=-1, keepdim=True) & (torch.arange(mask.size(-1), device=mask.device) == 0))
        hidden = self.encoder(hidden, readable)
        weight = readable.unsqueeze(-1).to(hidden.dtype)
        # The output at padding may be non-finite, and 0 * nan is nan: select instead of multiplying
        hidden = torch.where(readable.unsqueeze(-1), hidden, torch.zeros_like(hidden))
        pooled = hidden.sum(dim=1) / weight.sum(dim=1)
        return self.branch_embeddings(pooled)


class EncoderLayer(nn.Module):
    """`nn.TransformerEncoderLayer` without dropout. Its output is the same, and with the same seed its first weights.

    There is no dropout because a row's scores must not depend on the batch that the row is in.

    PyTorch's own class is not used because its attention reads the weight of the output projection without calling
    that module. FSDP1 and ZeRO-3 gather a weight only when its module is called.

    Args:
        dim: width.
        heads: number of attention heads.
        ffn_dim: width between the two feed-forward layers.
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, heads)
        self.linear1 = Linear(dim, ffn_dim)
        self.linear2 = Linear(ffn_dim, dim)
        self.norm1, self.norm2 = Norm(dim), Norm(dim)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Runs the layer.

        Args:
            hidden: [R, T, dim].
            mask: bool [R, T], True on the tokens that are attended to.

        Returns:
            [R, T, dim].
        """
        hidden = self.norm1(hidden + self.self_attn(hidden, mask))
        return self.norm2(hidden + self.linear2(functional.relu(self.linear1(hidden))))


def wide(values: Tensor) -> Tensor:
    """Values in float32 or higher.

    Between its products the selector computes in float32, as it would under autocast, because FSDP's mixed precision
    and DeepSpeed's bf16 hold its weights in bfloat16: there a score of 27 would be rounded to a multiple of 1/8.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Linear(nn.Linear):
    """A linear layer that casts its input to the dtype of its weights."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Shapes as for `nn.Linear`."""
        return super().forward(hidden.to(self.weight.dtype))


class BranchEmbeddings(nn.Linear):
    """The dot products with e_1 … e_K, without autocast: a score is not rounded to half precision."""

    def forward(self, pooled: Tensor) -> Tensor:
        """[R, d_sel] to [R, K]."""
        with torch.autocast(pooled.device.type, enabled=False):
            return functional.linear(pooled, self.weight.to(pooled.dtype))


class Norm(nn.LayerNorm):
    """A layer norm in float32 or higher."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises [..., dim]."""
        hidden = wide(hidden)
        weight, bias = self.weight.to(hidden.dtype), self.bias.to(hidden.dtype)
        return functional.layer_norm(hidden, self.normalized_shape, weight, bias, self.eps)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the computation and initialisation of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = skip_init(Linear, dim, 3 * dim, device=torch.get_default_device())
        self.out_proj = Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj.weight)
        for bias in (self.in_proj.bias, self.out_proj.bias):
            nn.init.zeros_(bias)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Shapes as for [`EncoderLayer.forward`]."""
        rows, tokens, dim = hidden.shape
        split = self.in_proj(hidden).view(rows, tokens, 3, self.heads, dim // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return self.out_proj(attended.transpose(1, 2).reshape(rows, tokens, dim))
