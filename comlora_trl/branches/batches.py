"""Batches: what counts as one row, and how lines are dealt out among the branches.

The competition counts rows: the sequences of a padded batch [B, T], or the segments of a packed (padding-free) line of
tokens [1, T], each a row of its own for the selector and the losses. A line is a row of a padded batch, or an example
of a packed one, whole. Dealt out, each line goes to one branch, in equal shares and without a repeat: lines come out
branch-major, and the smaller shares are filled up with lines that supervise nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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


class Dealt(NamedTuple):
    """A batch dealt out.

    Attributes:
        inputs: the batch, [n·s, ...] for n branches that have lines and shares of s lines (packed: [n, T']).
        branches: indices of the n branches.
        source: row of the original batch that each row comes from; -1 for what only fills up.
        owner: branch of each row.
    """

    inputs: dict[str, Any]
    branches: list[int]
    source: list[int]
    owner: list[int]


def indices(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 [n] on a device, without waiting for what was launched there before."""
    return torch.tensor(values, dtype=torch.long, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def deal(inputs: dict[str, Any], rows: Rows, owners: Sequence[int], rows_per_line: Sequence[int] | None) -> Dealt:
    """Deals a batch's lines out.

    Args:
        owners: the branch of each line; lines of -1 are left out.
        rows_per_line: rows that each line of a packed batch has, None for one each.
    """
    branches = sorted({owner for owner in owners if owner >= 0})
    if rows.packed:
        return _deal_packed(inputs, rows, owners, rows_per_line or [1] * len(owners), branches)
    shares = [[line for line, owner in enumerate(owners) if owner == branch] for branch in branches]
    size = max(map(len, shares))
    order = [line for share in shares for line in [*share, *share[:1] * (size - len(share))]]
    source = [line for share in shares for line in [*share, *[-1] * (size - len(share))]]
    device, lines = inputs["input_ids"].device, inputs["input_ids"].size(0)
    index = indices(order, device)
    dealt = {
        name: value.index_select(0, index) if isinstance(value, Tensor) and value.shape[:1] == (lines,) else value
        for name, value in inputs.items()
    }
    fillers = [place for place, line in enumerate(source) if line < 0]
    if fillers and "labels" in dealt:
        dealt["labels"] = dealt["labels"].index_fill(0, indices(fillers, device), IGNORE)
    return Dealt(dealt, branches, source, [branch for branch in branches for _ in range(size)])


def _deal_packed(
    inputs: dict[str, Any], rows: Rows, owners: Sequence[int], rows_per_line: Sequence[int], branches: list[int]
) -> Dealt:
    device = inputs["input_ids"].device
    # Rows past those of the lines are padding
    row_owner = [owner for owner, count in zip(owners, rows_per_line, strict=True) for _ in range(count)]
    row_owner += [-1] * (rows.count - len(row_owner))
    lengths = torch.bincount(rows.index.flatten(), minlength=rows.count).tolist()
    columns = {name: inputs[name][0].split(lengths) for name in ("input_ids", "labels", "position_ids")}
    own = [[row for row, owner in enumerate(row_owner) if owner == branch] for branch in branches]
    widths = [sum(lengths[row] for row in mine) for mine in own]
    width, new_lengths, source, owner = max(widths), [], [], []
    for branch, mine, used in zip(branches, own, widths, strict=True):
        fill = [width - used] if used < width else []
        new_lengths += [lengths[row] for row in mine] + fill
        source += mine + [-1] * len(fill)
        owner += [branch] * (len(mine) + len(fill))
    dealt = dict(inputs)
    for name, padding in (("input_ids", 0), ("labels", IGNORE)):
        lines = [torch.cat([columns[name][row] for row in mine]) for mine in own]
        dealt[name] = pad_sequence(lines, batch_first=True, padding_value=padding)
    positions = torch.cat([torch.arange(length, device=device) for length in new_lengths])
    dealt["position_ids"] = positions.view(len(branches), width)
    if "cu_seq_lens_q" in inputs:
        ends = torch.tensor(new_lengths, device=device).cumsum(0)
        boundaries = torch.cat([ends.new_zeros(1), ends]).to(inputs["cu_seq_lens_q"].dtype)
        longest = max(new_lengths)
        dealt |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
        dealt |= {"max_length_q": longest, "max_length_k": longest}
    return Dealt(dealt, branches, source, owner)
