"""The annotator: triplets in, labels with confidence out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cwpo.texts import text_problems
from cwpo.types import (
    Annotation,
    FailedAnnotation,
    ItemError,
    ModelRef,
    ScoreItem,
    Triplet,
    Truncation,
)
from cwpo_annotator.backends.base import Backend, EncodedPair, EncodedText
from cwpo_annotator.backends.null import NullBackend, NullEncoder
from cwpo_annotator.labels import Labels

if TYPE_CHECKING:
    from cwpo_annotator.backends.vllm_server import VllmServer

# Triplets that are tokenised at a time: several forward passes even on a large GPU.
_CHUNK = 4096

DType = Literal["auto", "float32", "bfloat16", "int8"]


class TextEncoder(Protocol):
    """Turns texts into token ids, or says what is wrong with them."""

    @property
    def max_length(self) -> int:
        """Tokens a text may have."""
        ...

    def encode_pairs(
        self, triplets: Sequence[Triplet], truncation: Truncation
    ) -> Sequence[EncodedPair | ItemError]:
        """Both texts of each triplet."""
        ...

    def encode_texts(
        self, items: Sequence[ScoreItem], truncation: Truncation
    ) -> Sequence[EncodedText | ItemError]:
        """The text of each item."""
        ...


class Annotator:
    """A loaded annotator.

    `annotate` does it all in one call. A server takes the steps apart: `encode` on one thread,
    `score_pairs` on batches of many requests on another, `label` at the end.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        backend: Backend,
        model: ModelRef,
        temperature: float | None = None,
        confidence_quantiles: Sequence[float] | None = None,
    ) -> None:
        self.encoder = encoder
        self.backend = backend
        self.model = model
        self.temperature = temperature
        self.confidence_quantiles = confidence_quantiles

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: DType = "auto",
        device: str = "auto",
        token_budget: int | None = None,
        threads: int | None = None,
    ) -> Annotator:
        """Load a checkpoint folder or Hub id with the torch backend.

        Any reward model of one output is one; without annotator.json it gets the defaults of
        `Encoder.create`.

        Args:
            dtype: of the weights and activations; auto is bfloat16 on a GPU and float32 on a CPU,
                and float32 on both for implicit rewards. int8 is for CPUs, and for checkpoints
                that `cwpo quantize` has written.
            device: cuda, mps, cpu, or auto for the best there is.
            token_budget: tokens a forward pass, padding included; None chooses by the device.
            threads: on a CPU, of the whole process; None takes the physical cores there are.
        Raises: CheckpointError for what is no annotator.
        """
        from cwpo_annotator import checkpoint
        from cwpo_annotator.backends.implicit import ImplicitBackend
        from cwpo_annotator.backends.torch import TorchBackend
        from cwpo_annotator.responses import encoder_of

        folder = checkpoint.resolve(path)
        checkpoint.check(folder)
        if dtype == "int8":
            checkpoint.require_int8(folder)
        card = checkpoint.read_card(folder)
        encoder = encoder_of(card.objective if card else None).load(folder)
        backend: Backend
        if card is not None and card.beta is not None:
            backend = ImplicitBackend(
                folder,
                beta=card.beta,
                dtype=dtype,
                device=device,
                token_budget=token_budget,
                threads=threads,
            )
        else:
            backend = TorchBackend(
                folder,
                pad_token_id=encoder.pad_token_id,
                dtype=dtype,
                device=device,
                token_budget=token_budget,
                threads=threads,
            )
        return cls(encoder, backend, *_identity(path, folder))

    @classmethod
    def over_vllm(
        cls, path: str | Path, url: str, *, dtype: DType = "auto", server: VllmServer | None = None
    ) -> Annotator:
        """An annotator whose checkpoint a vLLM server at `url` serves; `server` if it is ours.

        Texts are encoded here; some are scored here too, with the torch backend in float32, to be
        sure that the server scores the same.
        Raises: CheckpointError; BackendUnavailableError without a server; CwpoError for one that
        scores otherwise.
        """
        from cwpo_annotator import checkpoint
        from cwpo_annotator.backends.torch import TorchBackend
        from cwpo_annotator.backends.vllm import VllmBackend
        from cwpo_annotator.encoding import Encoder

        folder = checkpoint.resolve(path)
        card = checkpoint.read_card(folder)
        if card is not None and card.objective not in (None, "bt"):
            raise checkpoint.CheckpointError(
                f"{path}: annotators of the objective {card.objective} need --backend torch"
            )
        checkpoint.check(folder)
        encoder = Encoder.load(folder)
        backend = VllmBackend(url, dtype=dtype, server=server)
        texts = [text for text in encoder.encode_texts(GOLDEN) if isinstance(text, EncodedText)]
        reference = TorchBackend(
            folder, pad_token_id=encoder.pad_token_id, dtype="float32", device="cpu"
        )
        backend.verify(texts, reference.score_texts(texts))
        return cls(encoder, backend, *_identity(path, folder))

    @classmethod
    def null(cls) -> Annotator:
        """An annotator that scores by a hash, without a model; torch is never imported."""
        return cls(NullEncoder(), NullBackend(), ModelRef(name="null", revision="null"))

    def annotate(
        self, triplets: Sequence[Triplet], truncation: Truncation = "error"
    ) -> list[Annotation | FailedAnnotation]:
        """Label the triplets, in order; a triplet without id is named by its position."""
        ids = [str(i) if t.id is None else t.id for i, t in enumerate(triplets)]
        labels: list[Annotation | FailedAnnotation] = []
        for encoded in self._encode_ahead(triplets, truncation):
            pairs = [item for item in encoded if isinstance(item, EncodedPair)]
            of_chunk = ids[len(labels) : len(labels) + len(encoded)]
            labels += self.label(of_chunk, encoded, self.score_pairs(pairs)).annotations()
        return labels

    def encode(
        self, triplets: Sequence[Triplet], truncation: Truncation = "error"
    ) -> list[EncodedPair | ItemError]:
        """The token ids of each triplet, or what is wrong with it."""
        problems = text_problems(
            [t.prompt for t in triplets],
            response_a=[t.response_a for t in triplets],
            response_b=[t.response_b for t in triplets],
        )
        if not any(problems):
            return list(self.encoder.encode_pairs(triplets, truncation))
        good = [t for t, problem in zip(triplets, problems, strict=True) if problem is None]
        encoded = iter(self.encoder.encode_pairs(good, truncation))
        return [problem or next(encoded) for problem in problems]

    def _encode_ahead(
        self, triplets: Sequence[Triplet], truncation: Truncation
    ) -> Iterator[list[EncodedPair | ItemError]]:
        """Chunks of what `encode` gives, each made on a thread while the one before is in use."""
        chunks = [triplets[at : at + _CHUNK] for at in range(0, len(triplets), _CHUNK)]
        if len(chunks) < 2:
            yield from (self.encode(chunk, truncation) for chunk in chunks)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="tokeniser") as tokeniser:
            ahead = tokeniser.submit(self.encode, chunks[0], truncation)
            for chunk in chunks[1:]:
                encoded = ahead.result()
                ahead = tokeniser.submit(self.encode, chunk, truncation)
                yield encoded
            yield ahead.result()

    def encode_texts(
        self, items: Sequence[ScoreItem], truncation: Truncation = "error"
    ) -> list[EncodedText | ItemError]:
        """The token ids of each item, or what is wrong with it."""
        problems = text_problems(
            [item.prompt for item in items], response=[item.response for item in items]
        )
        if not any(problems):
            return list(self.encoder.encode_texts(items, truncation))
        good = [item for item, problem in zip(items, problems, strict=True) if problem is None]
        encoded = iter(self.encoder.encode_texts(good, truncation))
        return [problem or next(encoded) for problem in problems]

    def score_pairs(self, pairs: Sequence[EncodedPair]) -> NDArray[np.float32]:
        """Raw scores of a and b, shape (n, 2)."""
        if not pairs:
            return np.empty((0, 2), np.float32)
        return self.backend.score_pairs(pairs)

    def check_scores_single(self) -> None:
        """Raises: PairwiseError for an annotator that has no score of one response."""
        self.encoder.encode_texts([], "error")

    def score_texts(self, texts: Sequence[EncodedText]) -> NDArray[np.float32]:
        """Raw scores, shape (n,)."""
        if not texts:
            return np.empty(0, np.float32)
        return self.backend.score_texts(texts)

    def label(
        self,
        ids: Sequence[str],
        encoded: Sequence[EncodedPair | ItemError],
        scores: NDArray[np.float32],
    ) -> Labels:
        """Put scores, shape (pairs among encoded, 2), and errors together, in the order of ids."""
        return Labels.of(ids, encoded, scores, self.temperature)


def _identity(path: str | Path, folder: Path) -> tuple[ModelRef, float | None, list[float] | None]:
    """What tells the checkpoint from others, its temperature and its held-out confidence."""
    from cwpo_annotator import checkpoint

    name = folder.resolve().name if Path(path).is_dir() else str(path)
    card = checkpoint.read_card(folder)
    model = ModelRef(name=name, revision=checkpoint.revision(folder))
    if card is None:
        return model, None, None
    return model, card.temperature, card.confidence_quantiles


# Texts by which two backends are compared.
GOLDEN = (
    ScoreItem(prompt="Why is the sky blue?", response="Air scatters blue light more than red."),
    ScoreItem(prompt="Why is the sky blue?", response="no idea"),
    ScoreItem(prompt="2 + 2", response="5, as everybody knows; do not ask again."),
)
