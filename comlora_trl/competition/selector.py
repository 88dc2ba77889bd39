"""The selector of ComLoRA (eq. 1–3): one transformer encoder layer that scores every branch for every row.

It reads the frozen base model's token embeddings, so its scores are known before the language model runs. It trains
by the pairwise loss alone, is not used at inference and is not exported with the winner.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
        # Dropout would make a row's scores depend on the batch it came in, and they must not
        self.encoder = nn.TransformerEncoderLayer(dim, settings.heads, ffn_dim, dropout=0.0, batch_first=True)
        self.branch_embeddings = nn.Parameter(torch.empty(k, dim))
        # The encoder ends in a layer norm, so a pooled row has a norm of up to √d: scores start near unit size
        nn.init.normal_(self.branch_embeddings, std=dim**-0.5)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Scores sim (eq. 3).

        Args:
            embeddings: token embeddings, [R, T, d].
            mask: bool [R, T], True on the tokens to read; padding does not leak into a row's scores.

        Returns:
            [R, K]
        """
        hidden = self.projection(embeddings.detach().to(self.branch_embeddings.dtype))
        # A row without any token would attend to nothing and become nan; it reads its first position instead
        readable = mask | (~mask.any(dim=-1, keepdim=True) & (torch.arange(mask.size(-1), device=mask.device) == 0))
        hidden = self.encoder(hidden, src_key_padding_mask=~readable)
        weight = readable.unsqueeze(-1).to(hidden.dtype)
        # padding positions carry arbitrary values out of the encoder: select, do not multiply
        hidden = torch.where(readable.unsqueeze(-1), hidden, torch.zeros_like(hidden))
        pooled = hidden.sum(dim=1) / weight.sum(dim=1)
        return pooled @ self.branch_embeddings.to(pooled.dtype).T
