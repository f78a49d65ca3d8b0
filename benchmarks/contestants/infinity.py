"""infinity-emb, in an environment of its own: it needs transformers below 5.

    python -m venv .venv-infinity
    .venv-infinity/bin/pip install torch==2.13.0
    .venv-infinity/bin/pip install torch==2.13.0 "infinity-emb[torch]==0.0.78"
    CWPO_INFINITY_PYTHON=.venv-infinity/bin/python python benchmarks/annotator.py

Its engine is used without its HTTP server, and by `rerank`, since it takes a model of one output
for a reranker: the prompt is the query. It shares no prompts; it sorts texts by length and pads
them in batches. It strips white space from texts, so its scores differ where a response begins with
some.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Scores of the documents of each query.
Scorer = Callable[[Sequence[tuple[str, list[str]]]], list[list[float]]]

WORKER = Path(__file__).with_name("infinity_worker.py")


@contextmanager
def started(
    python: Path, folder: Path, *, dtype: str, device: str = "cpu", batch_size: int = 4
) -> Iterator[Scorer]:
    """A scorer of (query, documents) by infinity-emb on the checkpoint."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with TemporaryDirectory() as temporary:
        older = for_transformers_4(folder, Path(temporary) / "annotator")
        process = subprocess.Popen(
            [str(python), "-P", str(WORKER), str(older), dtype, device, str(batch_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

        def answer() -> Any:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"infinity-emb ended with exit code {process.wait()}")
            return json.loads(line)

        def score(queries: Sequence[tuple[str, list[str]]]) -> list[list[float]]:
            process.stdin.write(json.dumps(queries) + "\n")
            process.stdin.flush()
            answered: list[list[float]] = answer()
            return answered

        try:
            answer()
            yield score
        finally:
            process.stdin.close()
            process.wait(60)


def for_transformers_4(folder: Path, output: Path) -> Path:
    """A copy of the checkpoint whose configuration transformers 4 reads as version 5 does."""
    shutil.copytree(folder, output)
    config = json.loads((output / "config.json").read_text())
    # Unknown to version 4, which would take its default for the positions' base instead.
    config |= config.pop("rope_parameters", None) or {}
    config.pop("rope_type", None)
    config["torch_dtype"] = config.pop("dtype", "float32")
    (output / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((output / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer.pop("extra_special_tokens", None)
    (output / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return output
