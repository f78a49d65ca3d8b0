"""The annotator: triplets in, labels with confidence out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from cwpo.texts import prompt_order, responses_problem, text_problems
from cwpo.types import (
    Annotation,
    Certificate,
    FailedAnnotation,
    ItemError,
    ModelRef,
    Prompt,
    Ranking,
    RankItem,
    ScoreItem,
    Triplet,
    Truncation,
)
from cwpo_annotator.backends.base import Backend, EmbeddingBackend, NoEmbeddingsError
from cwpo_annotator.backends.null import NullBackend, NullEncoder
from cwpo_annotator.encoded import EncodedPair, EncodedResponses, EncodedText
from cwpo_annotator.labels import Labels
from cwpo_annotator.rankings import ranked, texts_of
from cwpo_annotator.scores import Scores

if TYPE_CHECKING:
    from cwpo_annotator.backends.vllm.server import VllmServer
    from cwpo_annotator.checkpoint import Card

# Triplets that are tokenised at a time: several forward passes even on a large GPU, which works on
# them while the next ones are tokenised.
_CHUNK = 1024

DType = Literal["auto", "float32", "bfloat16", "int8"]


class TextEncoder(Protocol):
    """Converts texts to token ids, or to errors."""

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a text."""
        ...

    @property
    def compares_only(self) -> bool:
        """Whether it encodes pairs only, because a single response has no score."""
        ...

    @property
    def reads(self) -> str:
        """What a text is made of, in words."""
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

    def encode_responses(
        self, items: Sequence[tuple[Prompt, Sequence[str]]], truncation: Truncation
    ) -> Sequence[Sequence[EncodedText] | ItemError]:
        """The texts of each prompt with each of its responses, all with the same prompt."""
        ...


class Annotator:
    """A loaded annotator.

    `annotate` does everything in one call. A server runs the steps separately: `encode` on one
    thread, `score_pairs` with batches of many requests on another, and finally `label`.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        backend: Backend,
        model: ModelRef,
        temperature: float | None = None,
        confidence_quantiles: Sequence[float] | None = None,
        former_revision: str | None = None,
        certificates: Sequence[Certificate] = (),
        card: Card | None = None,
    ) -> None:
        self.encoder = encoder
        self.backend = backend
        self.model = model
        self.former_revision = former_revision
        self.temperature = temperature
        self.confidence_quantiles = confidence_quantiles
        self.certificates = certificates
        self.card = card

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

        Any reward model with one output can be loaded, and SteamSHP; without annotator.json,
        `Encoder.load` tells how its texts are made.

        Args:
            dtype: number format of weights and activations; auto is bfloat16 on a GPU that has it,
                and else float32, as always for implicit rewards and SteamSHP. int8 works on CPUs
                only, with checkpoints that `cwpo quantize` has written.
            device: cuda, mps, cpu, or auto for the fastest available device.
            token_budget: maximum number of tokens in a forward pass, padding included; None
                chooses by the device.
            threads: CPU threads of the whole process; None uses one per physical core.
        Raises: CheckpointError for a folder or Hub id that holds no annotator.
        """
        from cwpo_annotator import checkpoint
        from cwpo_annotator.backends.torch.encoder_decoder import EncoderDecoderBackend
        from cwpo_annotator.backends.torch.implicit import ImplicitBackend
        from cwpo_annotator.backends.torch.scalar import ScalarHeadBackend
        from cwpo_annotator.encoding.readings import option_a
        from cwpo_annotator.encoding.responses import encoder_of

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
        elif encoder.spec.reading == "steamshp":
            backend = EncoderDecoderBackend(
                folder,
                answer_token_id=option_a(encoder.tokenizer),
                pad_token_id=encoder.pad_token_id,
                dtype=dtype,
                device=device,
                token_budget=token_budget,
                threads=threads,
            )
        else:
            backend = ScalarHeadBackend(
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
        """An annotator whose checkpoint is served by a vLLM server at `url`.

        Texts are encoded in this process. A few known texts are also scored here by the torch
        backend in float32, to check that the server gives the same scores.

        Args:
            dtype: number format that the server computes in.
            server: the process of the server, if it is to be stopped with the annotator.
        Raises: CheckpointError for a folder or Hub id that holds no annotator, or one that vLLM
            cannot serve; BackendUnavailableError if no server answers; CwpoError for a server
            whose scores differ.
        """
        from cwpo_annotator import checkpoint
        from cwpo_annotator.backends.torch.scalar import ScalarHeadBackend
        from cwpo_annotator.backends.vllm.backend import VllmBackend
        from cwpo_annotator.encoding.encoder import Encoder

        folder = checkpoint.resolve(path)
        card = checkpoint.read_card(folder)
        if card is not None and card.objective not in (None, "bt"):
            raise checkpoint.CheckpointError(
                f"{path}: annotators of the objective {card.objective} need --backend torch"
            )
        checkpoint.check(folder)
        encoder = Encoder.load(folder)
        if encoder.spec.reading == "steamshp":
            raise checkpoint.CheckpointError(f"{path}: encoder-decoders need --backend torch")
        backend = VllmBackend(url, dtype=dtype, server=server)
        texts = [
            text for text in encoder.encode_texts(GOLDEN_ITEMS) if isinstance(text, EncodedText)
        ]
        reference = ScalarHeadBackend(
            folder, pad_token_id=encoder.pad_token_id, dtype="float32", device="cpu"
        )
        backend.verify(texts, reference.score_texts(texts).values)
        return cls(encoder, backend, *_identity(path, folder))

    @classmethod
    def null(cls) -> Annotator:
        """An annotator without a model, whose scores come from a hash; torch is not imported."""
        return cls(NullEncoder(), NullBackend(), ModelRef(name="null", revision="null"))

    def has_revision(self, revision: str) -> bool:
        """Whether this is its revision, or the one by which version 0.2 and earlier knew it."""
        return revision in (self.model.revision, self.former_revision)

    def annotate(
        self, triplets: Sequence[Triplet], truncation: Truncation = "error"
    ) -> list[Annotation | FailedAnnotation]:
        """Label the triplets, in order; the id of a triplet without one is its position.

        Triplets of one prompt are read together, wherever they stand.
        """
        order = prompt_order([triplet.prompt for triplet in triplets])
        by_prompt = [triplets[at] for at in order]
        ids = [str(at) if t.id is None else t.id for at, t in zip(order, by_prompt, strict=True)]
        labels: list[Annotation | FailedAnnotation] = []
        for encoded in self._encode_ahead(by_prompt, truncation):
            pairs = [item for item in encoded if isinstance(item, EncodedPair)]
            of_chunk = ids[len(labels) : len(labels) + len(encoded)]
            labels += self.label(of_chunk, encoded, self.score_pairs(pairs)).annotations()
        of_triplet = dict(zip(order, labels, strict=True))
        return [of_triplet[at] for at in range(len(triplets))]

    def rank(
        self, items: Sequence[RankItem], truncation: Truncation = "error"
    ) -> list[Ranking | FailedAnnotation]:
        """Order the responses of each item; the id of an item without one is its position.

        Raises: PairwiseError for an annotator that cannot score a single response.
        """
        ids = [str(at) if item.id is None else item.id for at, item in enumerate(items)]
        encoded = self.encode_responses(items, truncation)
        rows = self.order(ids, encoded, self.score_texts(texts_of(encoded)))
        return [FailedAnnotation(**row) if "error" in row else Ranking(**row) for row in rows]

    def encode(
        self, triplets: Sequence[Triplet], truncation: Truncation = "error"
    ) -> list[EncodedPair | ItemError]:
        """The token ids of each triplet, or its error."""
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
        """The token ids of each item, or its error."""
        problems = text_problems(
            [item.prompt for item in items], response=[item.response for item in items]
        )
        if not any(problems):
            return list(self.encoder.encode_texts(items, truncation))
        good = [item for item, problem in zip(items, problems, strict=True) if problem is None]
        encoded = iter(self.encoder.encode_texts(good, truncation))
        return [problem or next(encoded) for problem in problems]

    def encode_responses(
        self, items: Sequence[RankItem], truncation: Truncation = "error"
    ) -> list[EncodedResponses | ItemError]:
        """The token ids of each item's prompt with each of its responses, or the item's error."""
        problems = [responses_problem(item.prompt, item.responses) for item in items]
        distinct = [dict.fromkeys(item.responses) for item in items]
        good = [
            (item.prompt, [*responses])
            for item, responses, problem in zip(items, distinct, problems, strict=True)
            if problem is None
        ]
        encoded = iter(self.encoder.encode_responses(good, truncation))
        return [
            problem or _placed(next(encoded), item.responses, responses)
            for item, responses, problem in zip(items, distinct, problems, strict=True)
        ]

    def score_pairs(self, pairs: Sequence[EncodedPair]) -> Scores:
        """Raw scores of responses a and b of each pair: values of shape (n, 2)."""
        if not pairs:
            return Scores(np.empty((0, 2), np.float32))
        return self.backend.score_pairs(pairs)

    def check_scores_single(self) -> None:
        """Raises: PairwiseError for an annotator that cannot score a single response."""
        from cwpo_annotator.encoding.responses import PairwiseError

        if self.encoder.compares_only:
            raise PairwiseError

    def score_texts(self, texts: Sequence[EncodedText]) -> Scores:
        """Raw scores of single texts: values of shape (n,)."""
        if not texts:
            return Scores(np.empty(0, np.float32))
        return self.backend.score_texts(texts)

    @property
    def embeds(self) -> bool:
        """Whether it has embeddings; vLLM shows scores only."""
        return isinstance(self.backend, EmbeddingBackend)

    def check_embeds(self) -> None:
        """Raises: NoEmbeddingsError where `embeds` is False."""
        self._embedder()

    def embed_pairs(self, pairs: Sequence[EncodedPair]) -> Scores:
        """The embedding of each pair, the mean over its texts: values of shape (n, width).

        Raises: NoEmbeddingsError where `embeds` is False.
        """
        embedder = self._embedder()
        return embedder.embed_pairs(pairs) if pairs else Scores(np.empty((0, 0), np.float32))

    def _embedder(self) -> EmbeddingBackend:
        if not isinstance(self.backend, EmbeddingBackend):
            raise NoEmbeddingsError(self.backend.name)
        return self.backend

    def label(
        self,
        ids: Sequence[str],
        encoded: Sequence[EncodedPair | ItemError],
        scores: Scores,
    ) -> Labels:
        """The labels of all items in the order of ids, from their errors or their pairs' scores."""
        return Labels.of(ids, encoded, scores, self.temperature)

    def order(
        self,
        ids: Sequence[str],
        encoded: Sequence[EncodedResponses | ItemError],
        scores: Scores,
    ) -> list[dict[str, Any]]:
        """The fields of all items' rankings in the order of ids, from errors or texts' scores."""
        return ranked(ids, encoded, scores, self.temperature)


def _placed(
    texts: Sequence[EncodedText] | ItemError, responses: Sequence[str], distinct: Iterable[str]
) -> EncodedResponses | ItemError:
    """The texts of distinct responses, with the place of each response among them."""
    if isinstance(texts, ItemError):
        return texts
    places = {response: at for at, response in enumerate(distinct)}
    return EncodedResponses(texts, [places[response] for response in responses])


def _identity(
    path: str | Path, folder: Path
) -> tuple[ModelRef, float | None, list[float] | None, str, list[Certificate], Card | None]:
    """Name and revision, temperature, quantiles of confidence, former revision, certificates, card.

    The card is annotator.json; None for a reward model from elsewhere.
    """
    from cwpo_annotator import checkpoint

    name = folder.resolve().name if Path(path).is_dir() else str(path)
    card = checkpoint.read_card(folder)
    revision, former = checkpoint.revisions(folder)
    model = ModelRef(name=name, revision=revision)
    if card is None:
        return model, None, None, former, [], None
    certificates = card.certificates or []
    return model, card.temperature, card.confidence_quantiles, former, certificates, card


# What a vLLM server scores first, to be compared with the scores of the torch backend.
GOLDEN_ITEMS = (
    ScoreItem(prompt="Why is the sky blue?", response="Air scatters blue light more than red."),
    ScoreItem(prompt="Why is the sky blue?", response="no idea"),
    ScoreItem(prompt="2 + 2", response="5, as everybody knows; do not ask again."),
)
