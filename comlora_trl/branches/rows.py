"""Rows: what the competition counts as one sequence, in a padded batch or inside a packed one.

A padded batch [B, T] has B rows. A packed (padding-free) batch is one line of tokens [1, T] with several segments,
each a row of its own for the selector and the losses.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch lie.

    Attributes:
        index: row of every token, [B, T] int64.
        real: bool [B, T], False on padding.
        count: R.
        longest: tokens of the longest row (an upper bound is enough).
        packed: whether several rows share one line of tokens.
    """

    index: Tensor
    real: Tensor
    count: int
    longest: int
    packed: bool

    @classmethod
    def of(cls, inputs: dict[str, Tensor]) -> "Rows":
        """Rows of a batch: from `attention_mask` or, packed, from `cu_seq_lens_q`, or else `position_ids`."""
        tokens = inputs["input_ids"]
        batch, length = tokens.shape
        boundaries = inputs.get("cu_seq_lens_q")
        if boundaries is not None:
            starts = inputs["position_ids"] == 0
            index = (starts.flatten().cumsum(dim=-1) - 1).view(batch, length)
            count = boundaries.numel() - 1
            return cls(index, torch.ones_like(tokens, dtype=torch.bool), count, int(inputs["max_length_q"]), True)
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is None and positions is not None and batch == 1:
            # A flattened line without boundaries (`DataCollatorWithFlattening`): a sequence begins at position 0
            starts = positions == 0
            lengths = torch.cat([starts[0].nonzero().flatten(), starts.new_tensor([length], dtype=torch.long)]).diff()
            if lengths.numel() > 1:
                index = (starts.cumsum(dim=-1) - 1).clamp(min=0)
                return cls(index, torch.ones_like(tokens, dtype=torch.bool), len(lengths), int(lengths.max()), True)
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        index = torch.arange(batch, device=tokens.device)[:, None].expand(batch, length)
        return cls(index, real, batch, length, False)

    def sum(self, values: Tensor) -> Tensor:
        """Adds up `values` [..., B, T'] over each row's tokens, [..., R].

        T' is T, or T − 1 for values of the next-token prediction, which belong to the row of the predicted token.
        """
        if not self.packed:
            return values.sum(dim=-1)
        index = self.index[:, -values.size(-1) :].reshape(-1)
        flat = values.reshape(*values.shape[:-2], -1)
        total = flat.new_zeros(*flat.shape[:-1], self.count)
        return total.index_add(-1, index, flat)

    def supervised_tokens(self, labels: Tensor) -> Tensor:
        """m, the supervised tokens of each row after the shift, [R] int64."""
        return self.sum((labels[:, 1:] != IGNORE).long())

    def prompt(self, labels: Tensor) -> Tensor:
        """bool [B, T], the tokens before each row's first supervised one; at least the row's first token."""
        seen = (labels != IGNORE).long().cumsum(dim=-1)
        if self.packed:
            # Tokens supervised before the row begins do not count
            begins = torch.searchsorted(self.index[0].contiguous(), torch.arange(self.count, device=labels.device))
            before = torch.cat([seen.new_zeros(1), seen[0]])[begins]
            seen = seen - before[self.index]
            first = torch.zeros_like(self.real)
            first[0, begins] = True
        else:
            first = (self.real.long().cumsum(dim=-1) == 1) & self.real
        return ((seen == 0) & self.real) | first

    def split(self, embeddings: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """One line per row: embeddings [R, T_row, d] and the mask [R, T_row] of the tokens in `keep` [B, T]."""
        if not self.packed:
            return embeddings, keep
        begins = torch.searchsorted(self.index[0].contiguous(), torch.arange(self.count, device=keep.device))
        ends = torch.cat([begins[1:], begins.new_tensor([keep.size(-1)])])
        position = begins[:, None] + torch.arange(self.longest, device=keep.device)
        inside = position < ends[:, None]
        position = position.clamp(max=keep.size(-1) - 1)
        return embeddings[0][position], keep[0][position] & inside
