"""Hugging Face's own forward pass, in length-sorted batches and by its pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase, pipeline

from cwpo_annotator.encoded import EncodedPair


@torch.inference_mode()
def length_sorted(
    model: PreTrainedModel, pairs: list[EncodedPair], size: int
) -> NDArray[np.float32]:
    """Scores of both responses, shape (pairs, 2), in batches of `size` texts, longest first."""
    pad = model.config.pad_token_id
    texts = [ids for pair in pairs for ids in (pair.a, pair.b)]
    order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
    scores = np.empty(len(texts), np.float32)
    for start in range(0, len(texts), size):
        places = order[start : start + size]
        batch = [list(texts[at]) for at in places]
        width = len(batch[0])
        ids = torch.tensor([[*text, *[pad] * (width - len(text))] for text in batch])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in batch])
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        scores[places] = logits[:, 0].float().cpu().numpy()
    return scores.reshape(-1, 2)


def padding_share(pairs: list[EncodedPair], size: int) -> float:
    """Of the positions of such batches, how many are padding."""
    lengths = sorted((len(ids) for pair in pairs for ids in (pair.a, pair.b)), reverse=True)
    batches = (lengths[at : at + size] for at in range(0, len(lengths), size))
    return 1 - sum(lengths) / sum(len(batch) * batch[0] for batch in batches)


def by_pipeline(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """Scores of pairs by pipeline("text-classification")."""
    classify = pipeline(
        "text-classification",
        model=model,
        tokenizer=tokenizer,
        function_to_apply="none",
        device=model.device,
    )

    def score(pairs: list[EncodedPair]) -> NDArray[np.float32]:
        texts = [tokenizer.decode(ids) for pair in pairs for ids in (pair.a, pair.b)]
        scores = [answer["score"] for answer in classify(texts, batch_size=batch_size)]
        return np.array(scores, np.float32).reshape(-1, 2)

    return score
