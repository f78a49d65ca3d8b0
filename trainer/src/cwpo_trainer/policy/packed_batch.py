"""Batches of TRL's collators as packed rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cwpo_annotator.backends.torch.rows.packing import pack_pairs, pack_texts
from cwpo_annotator.backends.torch.rows.row import Row
from cwpo_annotator.encoded import EncodedPair
from cwpo_trainer.plan.row_sizes import ROW_MULTIPLE
from cwpo_trainer.policy.packed_model import PackedResponses


def packed_pairs(batch: Mapping[str, Tensor], tokens: int | None) -> list[PackedResponses]:
    """The pairs of a batch: row i is the chosen and row n + i the rejected text of pair i.

    Args:
        batch: input_ids, attention_mask and completion_mask, shape (2n, longest).
        tokens: maximum number of a row; None for one row.
    Returns: rows in which text 2i is the chosen and text 2i + 1 the rejected one of pair i.
    """
    texts, starts = _texts(batch, batch["completion_mask"].bool())
    count = len(texts) // 2
    pairs = [EncodedPair(texts[at], texts[count + at]) for at in range(count)]
    rows = pack_pairs(pairs, tokens or sum(map(len, texts)))
    return _filled(rows, [starts[at % 2 * count + at // 2] for at in range(2 * count)])


def packed_texts(batch: Mapping[str, Tensor], tokens: int | None) -> list[PackedResponses]:
    """The texts of a batch.

    Args:
        batch: input_ids, attention_mask and labels, shape (n, longest), each text labelled from
            some token to its end.
        tokens: maximum number of a row; None for one row.
    """
    texts, starts = _texts(batch, batch["labels"] >= 0)
    return _filled(pack_texts(texts, tokens or sum(map(len, texts))), starts)


def pairs_of(packed: PackedResponses) -> list[int]:
    """The indices of the pairs of a row, ascending."""
    return [text // 2 for text in sorted(packed.row.texts)[::2]]


def of_chosen_and_rejected(packed: PackedResponses, of_texts: Tensor) -> Tensor:
    """Values of the texts of a row of pairs, shape (2, pairs), in the order of `pairs_of`."""
    order = torch.tensor(packed.row.texts).argsort()
    return of_texts[order.to(of_texts.device)].view(-1, 2).T


def _texts(batch: Mapping[str, Tensor], is_response: Tensor) -> tuple[list[list[int]], list[int]]:
    """The tokens of each text, and where its response starts."""
    texts, starts = [], []
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), is_response, strict=True)
    for ids, is_token, scored in rows:
        texts.append(ids[is_token].tolist())
        starts.append(int((is_token & ~scored).sum()))
    return texts, starts


def _filled(rows: Iterable[Row], starts: Sequence[int]) -> list[PackedResponses]:
    filled = []
    for row in rows:
        row.fill(ROW_MULTIPLE)
        filled.append(PackedResponses(row, [starts[text] for text in row.texts]))
    return filled
