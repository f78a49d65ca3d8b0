"""Log-probabilities of responses under a policy: of both of labelled pairs, and of answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cwpo_annotator.backends.torch.log_probs import row_log_probs
from cwpo_annotator.backends.torch.rows.packing import length_sorted, pack_texts
from cwpo_annotator.backends.torch.rows.padding import padded
from cwpo_trainer.data.labelled import LabelledPair
from cwpo_trainer.plan.row_sizes import ROW_MULTIPLE, row_tokens
from cwpo_trainer.policy.formatting import TokenisedText
from cwpo_trainer.policy.sampling import LoadedPolicy
from cwpo_trainer.run.chunks import chunks

# The ids of a text, and where its response starts in them.
_Text = tuple[list[int], int]
# Tokens of a padded batch, all of whose logits exist at a time.
_PADDED_TOKENS = 4096


def pair_log_probs(
    policy: LoadedPolicy, pairs: Sequence[LabelledPair], batch_size: int, work: str
) -> NDArray[np.float64]:
    """Summed log-probabilities of chosen and rejected responses, shape (pairs, 2).

    The other arguments are those of `response_log_probs`.
    """
    texts = policy.formatter.tokenise(
        [pair.prompt for pair in pairs for _ in range(2)],
        [response for pair in pairs for response in (pair.chosen, pair.rejected)],
    )
    return response_log_probs(policy, texts, batch_size, work).reshape(-1, 2)


def response_log_probs(
    policy: LoadedPolicy, tokenised: Sequence[TokenisedText], batch_size: int, work: str
) -> NDArray[np.float64]:
    """Summed log-probability of each response, shape (texts,).

    Prompts are read once, in packed rows, by models that allow it; see `read_packed`.

    Args:
        batch_size: texts of a forward pass, if all were as long as the longest.
        work: what is read, for the user.
    """
    texts = [(text.prompt_ids + text.response_ids, len(text.prompt_ids)) for text in tokenised]
    read = _read_rows if policy.reads_rows else _read_batches
    result = np.empty(len(texts))
    with torch.inference_mode():
        for places, log_probs in read(policy, texts, batch_size, work):
            result[places] = log_probs.double().cpu()
    return result


def _read_rows(
    policy: LoadedPolicy, texts: Sequence[_Text], batch_size: int, work: str
) -> Iterator[tuple[list[int], torch.Tensor]]:
    longest = max(len(ids) for ids, _ in texts)
    budget = min(row_tokens(policy.model.device.type), batch_size * longest)
    rows = [*pack_texts([ids for ids, _ in texts], budget)]
    for (row,) in chunks(rows, 1, work=work, unit="rows"):
        row.fill(ROW_MULTIPLE)
        starts = [texts[place][1] for place in row.texts]
        yield row.texts, row_log_probs(policy.model, row, starts).sums


def _read_batches(
    policy: LoadedPolicy, texts: Sequence[_Text], batch_size: int, work: str
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """From the logits of the whole model, since some families scale or cap what their head gives.

    Of these logits, those of one text at a time are made float32.
    """
    lengths = [len(ids) for ids, _ in texts]
    batches = length_sorted(lengths, min(_PADDED_TOKENS, batch_size * max(lengths)))
    for (places,) in chunks(batches, 1, work=work, unit="batches"):
        ids, mask = padded(
            [texts[at][0] for at in places], policy.tokenizer.pad_token_id, policy.model.device
        )
        logits = policy.model(input_ids=ids, attention_mask=mask).logits
        of_texts = [
            _log_prob(of_text, *texts[at]) for at, of_text in zip(places, logits, strict=True)
        ]
        yield places, torch.stack(of_texts)


def _log_prob(logits: torch.Tensor, ids: list[int], start: int) -> torch.Tensor:
    # Nothing predicts the first token of all.
    start = max(start, 1)
    targets = torch.tensor(ids[start:], device=logits.device)
    of_all = logits[start - 1 : len(ids) - 1].float().log_softmax(dim=1)
    return of_all.gather(1, targets[:, None]).sum()
