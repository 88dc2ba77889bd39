"""Dealing rows out: each line of a batch goes to one branch, in equal shares, without a repeat.

A line is a row of a padded batch, or an example of a packed one, whole. Lines come out branch-major; where the shares
are unequal the smaller ones are filled up with lines that supervise nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from comlora_trl.branches.rows import IGNORE, Rows


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
