"""A vLLM server that this process starts, watches over and stops."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx2

from cwpo.errors import CwpoError
from cwpo.process import free_port
from cwpo.progress import SECONDS_BETWEEN_LINES
from cwpo_annotator import checkpoint
from cwpo_annotator.backends.vllm.process import CPU_ARGUMENTS, VllmProcess
from cwpo_annotator.encoding.encoder import Encoder

_MODULE = "vllm.entrypoints.openai.api_server"
# The score is the logit at the last token, as the head was trained.
_POOLER = {"task": "classify", "seq_pooling_type": "LAST", "use_activation": False}
_START_SECONDS = 600.0
_LONGEST_BACK_OFF = 30.0

logger = logging.getLogger("cwpo_annotator")


class VllmServer:
    """One server for one checkpoint, started again when it dies.

    Args:
        python: the interpreter of the environment that holds vLLM.
        annotator: folder or Hub id of the checkpoint.
        dtype: auto, float32 or bfloat16.
        on_cpu: whether to start it with what suits a CPU.
        arguments: more of vLLM's own command line.
    """

    def __init__(
        self,
        python: Path,
        annotator: str | Path,
        *,
        dtype: str = "auto",
        on_cpu: bool = False,
        arguments: Sequence[str] = (),
    ) -> None:
        self.on_cpu = on_cpu
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        folder = checkpoint.resolve(annotator)
        if checkpoint.is_adapter(folder):
            raise checkpoint.CheckpointError(
                f"{annotator}: the vLLM backend does not accept adapters; merge it into "
                "its base model with merge_and_unload, save that and name its folder"
            )
        length = Encoder.load(folder).max_length
        words = ["-m", _MODULE, "--host", "127.0.0.1", "--port", str(self._port)]
        words += ["--model", str(folder), "--served-model-name", "annotator"]
        words += ["--runner", "pooling", "--pooler-config", json.dumps(_POOLER)]
        words += ["--dtype", dtype, "--max-model-len", str(length), "--enable-prefix-caching"]
        words += [*(CPU_ARGUMENTS if on_cpu else ()), *arguments]
        self._process = VllmProcess(python, words, on_cpu=on_cpu)
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="vllm-watcher", daemon=True)

    def start(self) -> None:
        """Start it and wait until it is healthy; the log tells how long that takes.

        Raises: CwpoError when there is no such interpreter, or the server ends or is not healthy in
        time; its log says why.
        """
        self._process.start()
        begun = time.monotonic()
        next_line = 0.0
        while not self._is_healthy():
            waited = time.monotonic() - begun
            if waited >= next_line:
                logger.warning(
                    "waiting for vLLM to start: %.0f s of at most %.0f s (its log: %s)",
                    *(waited, _START_SECONDS, self._process.log),
                )
                next_line += SECONDS_BETWEEN_LINES
            if self._process.exit_code is not None:
                raise CwpoError(f"vLLM exited while starting: {self._process.last_words()}")
            if waited > _START_SECONDS:
                self.stop()
                raise CwpoError(
                    f"vLLM was not healthy within {_START_SECONDS:.0f} s: {self._process.log}"
                )
            time.sleep(0.5)
        self._watcher.start()

    def stop(self) -> None:
        """Stop it with all its processes."""
        self._stopped.set()
        self._process.stop()

    def _watch(self) -> None:
        delay = 1.0
        while not self._stopped.wait(delay):
            exit_code = self._process.exit_code
            if exit_code is None:
                delay = 1.0
                continue
            logger.error(
                "vLLM ended with exit code %d; starting it again (its log: %s)",
                *(exit_code, self._process.log),
            )
            self._process.start()
            delay = min(2.0 * delay, _LONGEST_BACK_OFF)

    def _is_healthy(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health", timeout=5.0).is_success
        except httpx2.TransportError:
            return False
