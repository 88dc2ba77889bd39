"""The rows and lines of a batch, and the distribution of lines among the branches.

A row is a sequence of a padded batch [B, T], or a segment of a packed (padding-free) batch [1, T]. The selector and
the losses work on rows. A line is a row of a padded batch, or a whole example of a packed batch, which may have
several rows.

If rows are shared, [`deal`] gives each line to one branch. The result is branch-major: first the lines of the first
branch, then those of the next. All branches get the same number of lines; lines without supervised tokens fill up the
smaller shares.
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
    """The positions of the rows in a batch.

    Attributes:
        index: the row of each token, int64 [B, T].
        real: bool [B, T], False on padding.
        count: number of rows, R.
        longest: number of tokens of the longest row, or an upper bound of it.
        packed: whether the rows are segments of one packed line.
    """

    index: Tensor
    real: Tensor
    count: int
    longest: int
    packed: bool

    @classmethod
    def of(cls, inputs: dict[str, Tensor]) -> "Rows":
        """The rows of a batch: by `cu_seq_lens_q` or `position_ids` if it is packed, else by `attention_mask`."""
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
            # `DataCollatorWithFlattening` gives a packed line without boundaries: a sequence begins at each position 0
            starts = positions == 0
            lengths = torch.cat([starts[0].nonzero().flatten(), starts.new_tensor([length], dtype=torch.long)]).diff()
            if lengths.numel() > 1:
                index = (starts.cumsum(dim=-1) - 1).clamp(min=0)
                return cls(index, torch.ones_like(tokens, dtype=torch.bool), len(lengths), int(lengths.max()), True)
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        index = torch.arange(batch, device=tokens.device)[:, None].expand(batch, length)
        return cls(index, real, batch, length, False)

    def sum(self, values: Tensor) -> Tensor:
        """Sums values over the tokens of each row.

        Args:
            values: [..., B, T'] with T' = T, or T' = T − 1 for values of the next-token prediction. Such a value
                belongs to the row of the predicted token.

        Returns:
            the sums, [..., R].
        """
        if not self.packed:
            return values.sum(dim=-1)
        index = self.index[:, -values.size(-1) :].reshape(-1)
        flat = values.reshape(*values.shape[:-2], -1)
        total = flat.new_zeros(*flat.shape[:-1], self.count)
        return total.index_add(-1, index, flat)

    def supervised_tokens(self, labels: Tensor) -> Tensor:
        """m, the number of supervised tokens of each row after the shift by one token, int64 [R]."""
        return self.sum((labels[:, 1:] != IGNORE).long())

    def prompt(self, labels: Tensor) -> Tensor:
        """bool [B, T], True on the tokens before a row's first supervised one, and always on a row's first token."""
        seen = (labels != IGNORE).long().cumsum(dim=-1)
        if self.packed:
            # The running count starts anew at each row
            begins = torch.searchsorted(self.index[0].contiguous(), torch.arange(self.count, device=labels.device))
            before = torch.cat([seen.new_zeros(1), seen[0]])[begins]
            seen = seen - before[self.index]
            first = torch.zeros_like(self.real)
            first[0, begins] = True
        else:
            first = (self.real.long().cumsum(dim=-1) == 1) & self.real
        return ((seen == 0) & self.real) | first

    def split(self, embeddings: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Splits the embeddings of a batch by row.

        Args:
            embeddings: [B, T, d].
            keep: bool [B, T], the tokens to read.

        Returns:
            the embeddings of each row, [R, T_row, d], and the mask of the tokens to read, bool [R, T_row]. T_row is
            `longest`, or T if the batch is not packed.
        """
        if not self.packed:
            return embeddings, keep
        begins = torch.searchsorted(self.index[0].contiguous(), torch.arange(self.count, device=keep.device))
        ends = torch.cat([begins[1:], begins.new_tensor([keep.size(-1)])])
        position = begins[:, None] + torch.arange(self.longest, device=keep.device)
        inside = position < ends[:, None]
        position = position.clamp(max=keep.size(-1) - 1)
        return embeddings[0][position], keep[0][position] & inside


class Dealt(NamedTuple):
    """A batch whose lines are distributed among the branches.

    Attributes:
        inputs: the batch, branch-major: [n·s, ...] for the n branches that have lines, with shares of s lines each
            (packed: [n, T'], one line for each branch).
        branches: indices of the n branches.
        source: for each row, the row of the original batch that it comes from; -1 for a row that only fills up.
        owner: for each row, its branch.
    """

    inputs: dict[str, Any]
    branches: list[int]
    source: list[int]
    owner: list[int]


def indices(values: Sequence[int], device: torch.device) -> Tensor:
    """Indices as a tensor on a device, int64 [n]. The copy does not wait for earlier work on the device."""
    return torch.tensor(values, dtype=torch.long, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def deal(inputs: dict[str, Any], rows: Rows, owners: Sequence[int], rows_per_line: Sequence[int] | None) -> Dealt:
    """Distributes the lines of a batch among the branches.

    Args:
        inputs: the batch.
        rows: the batch's rows.
        owners: the branch of each line; lines with -1 are left out.
        rows_per_line: number of rows of each line of a packed batch; None for one row each.
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
    # Rows after those of the last line are padding
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
