"""Scores with a vLLM server, which runs in a separate environment and process.

The server gets token ids, so that texts are encoded here as in training. It is asked for raw
logits: by default it returns sigmoid(score), which cannot be distinguished from a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
from numpy.typing import NDArray

from cwpo.errors import CwpoError
from cwpo_annotator.backends.base import BackendUnavailableError, ReadsOnce
from cwpo_annotator.backends.vllm.server import VllmServer
from cwpo_annotator.encoded import EncodedPair, EncodedText
from cwpo_annotator.scores import Scores

# Tokens that keep a GPU busy; a server by URL is taken to have one.
_BATCH_TOKENS = {"gpu": 65536, "cpu": 4096}
# Texts that begin alike go in one request, next to each other, for vLLM's prefix cache.
_REQUEST_TEXTS = 32


class VllmBackend:
    """A client of one vLLM server.

    Args:
        url: address of the server, started with `--runner pooling` and a last-token classify
            pooler.
        dtype: number format that the server computes in.
        server: the process of the server, if `close` is to stop it.
        concurrency: number of requests at a time; the server batches across them.
        timeout: seconds to wait for an answer.
    """

    name = "vllm"
    device = "vllm"
    reads_once: ReadsOnce = "beginnings"

    def __init__(
        self,
        url: str,
        *,
        dtype: str = "auto",
        server: VllmServer | None = None,
        concurrency: int = 8,
        timeout: float = 300.0,
    ) -> None:
        self.url = url.rstrip("/")
        self.dtype = dtype
        self._http = httpx2.Client(base_url=self.url, timeout=timeout)
        self._server = server
        is_on_cpu = server is not None and server.on_cpu
        self.batch_tokens = _BATCH_TOKENS["cpu" if is_on_cpu else "gpu"]
        self._model: str | None = None
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="vllm")

    def score_pairs(self, pairs: Sequence[EncodedPair]) -> Scores:
        """Values of shape (n, 2); see Backend."""
        texts = [ids for pair in pairs for ids in (pair.a, pair.b)]
        return Scores(self._score(texts).reshape(-1, 2))

    def score_texts(self, texts: Sequence[EncodedText]) -> Scores:
        """Values of shape (n,); see Backend."""
        return Scores(self._score([text.ids for text in texts]))

    def check(self) -> None:
        """Raises: BackendUnavailableError when the server or its engine does not answer."""
        try:
            response = self._http.get("/health", timeout=5.0)
        except httpx2.TransportError as error:
            raise BackendUnavailableError(f"no answer from vLLM at {self.url}: {error}") from error
        if not response.is_success:
            raise BackendUnavailableError(
                f"vLLM at {self.url} is not healthy: {response.status_code}"
            )

    def verify(self, texts: Sequence[EncodedText], expected: NDArray[np.float32]) -> None:
        """Compare the server's scores with those of the torch backend.

        Args:
            expected: scores of the torch backend, shape (n,).
        Raises: CwpoError if they differ: the server has another model, or returns no raw logits.
        """
        scores = self.score_texts(texts).values
        tolerance = 0.01 if self.dtype == "float32" else 0.1
        error = float(np.abs(scores - expected).max())
        if not error <= tolerance * max(1.0, float(np.abs(expected).max())):
            raise CwpoError(
                f"vLLM at {self.url} gives known texts the scores {_list(scores)} instead of "
                f"{_list(expected)}: does it serve this checkpoint, with last-token pooling?"
            )

    def close(self) -> None:
        """Close the connections, and stop the server if it is ours."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()
        if self._server is not None:
            self._server.stop()

    def _score(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        asked = [tuple(ids) for ids in sequences]
        texts = sorted(set(asked))
        requests = [texts[at : at + _REQUEST_TEXTS] for at in range(0, len(texts), _REQUEST_TEXTS)]
        scores = np.concatenate([*self._threads.map(self._classify, requests)])
        place = {text: at for at, text in enumerate(texts)}
        return scores[[place[text] for text in asked]]

    def _classify(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        inputs = [list(ids) for ids in sequences]
        try:
            body = {"model": self._served_model(), "input": inputs, "use_activation": False}
            response = self._http.post("/classify", json=body)
        except httpx2.TransportError as error:
            raise BackendUnavailableError(f"no answer from vLLM at {self.url}: {error}") from error
        if response.is_server_error:
            raise BackendUnavailableError(f"vLLM answered {response.status_code}")
        if not response.is_success:
            raise CwpoError(f"vLLM refused a request with {response.status_code}: {_why(response)}")
        rows = sorted(response.json()["data"], key=lambda row: int(row["index"]))
        if len(rows) != len(sequences) or any(len(row["probs"]) != 1 for row in rows):
            raise CwpoError("vLLM did not return one score per text: is the model a reward model?")
        return np.array([row["probs"][0] for row in rows], np.float32)

    def _served_model(self) -> str:
        if self._model is None:
            models = self._http.get("/v1/models")
            if not models.is_success:
                raise BackendUnavailableError(f"vLLM answered {models.status_code}")
            self._model = str(models.json()["data"][0]["id"])
        return self._model


def _list(scores: NDArray[np.float32]) -> str:
    return ", ".join(f"{score:.3f}" for score in scores.tolist())


def _why(response: httpx2.Response) -> str:
    try:
        answer: Any = response.json()
        return str(answer.get("message") or answer["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "no reason was given"
