"""A service whose device scores so many pairs a second: a GPU of known speed, without the GPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from cwpo.types import ModelRef
from cwpo_annotator.annotator import Annotator
from cwpo_annotator.backends.null import NullBackend, NullEncoder
from cwpo_annotator.encoded import EncodedPair
from cwpo_annotator.scores import Scores
from cwpo_service.app import create_app
from cwpo_service.server import Server, listen
from cwpo_service.settings import ServeSettings


class PacedBackend(NullBackend):
    """The null backend, held up."""

    def __init__(self, pairs_per_second: float) -> None:
        self._seconds_per_pair = 1.0 / pairs_per_second

    def score_pairs(self, pairs: Sequence[EncodedPair]) -> Scores:
        """Scores, after the time that the device takes."""
        time.sleep(len(pairs) * self._seconds_per_pair)
        return super().score_pairs(pairs)


if __name__ == "__main__":
    port, pairs_per_second, queue_tokens = (int(argument) for argument in sys.argv[1:])
    settings = ServeSettings(backend="null", port=port, queue_tokens=queue_tokens)
    annotator = Annotator(
        NullEncoder(), PacedBackend(pairs_per_second), ModelRef(name="paced", revision="1")
    )
    with listen(settings.host, settings.port) as listener:
        Server(create_app(settings, lambda: annotator), settings.drain_seconds).serve_on(listener)
