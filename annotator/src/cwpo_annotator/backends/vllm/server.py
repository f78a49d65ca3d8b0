"""A vLLM server that this process starts, watches over and stops.

vLLM lives in an environment of its own: its pins exclude those of the trainer.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx2

from cwpo.errors import CwpoError
from cwpo.process import die_with_parent, free_port
from cwpo.progress import SECONDS_BETWEEN_LINES
from cwpo_annotator import checkpoint
from cwpo_annotator.encoding.encoder import Encoder

_MODULE = "vllm.entrypoints.openai.api_server"
# The score is the logit at the last token, as the head was trained.
_POOLER = {"task": "classify", "seq_pooling_type": "LAST", "use_activation": False}
_START_SECONDS = 600.0
_LONGEST_BACK_OFF = 30.0
_CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
# Prompts are short next to the block that vLLM takes on a CPU by default, and only whole blocks
# are shared between the two texts of a pair.
_CPU_ARGUMENTS = ("--enforce-eager", "--block-size", "32")

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
        self._log = Path(tempfile.mkdtemp(prefix="cwpo-vllm-")) / "vllm.log"
        self._environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        self._command = [str(python), "-m", _MODULE]
        self._command += ["--host", "127.0.0.1", "--port", str(self._port)]
        self._command += ["--model", str(folder), "--served-model-name", "annotator"]
        self._command += ["--runner", "pooling", "--pooler-config", json.dumps(_POOLER)]
        self._command += ["--dtype", dtype, "--max-model-len", str(length)]
        self._command += ["--enable-prefix-caching"]
        if on_cpu:
            self._environment |= _CPU_ENVIRONMENT
            self._command += _CPU_ARGUMENTS
        self._command += arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="vllm-watcher", daemon=True)

    def start(self) -> None:
        """Start it and wait until it is healthy; the log tells how long that takes.

        Raises: CwpoError when there is no such interpreter, or the server ends or is not healthy in
        time; its log says why.
        """
        self._spawn()
        begun = time.monotonic()
        next_line = 0.0
        while not self._is_healthy():
            waited = time.monotonic() - begun
            if waited >= next_line:
                logger.warning(
                    "waiting for vLLM to start: %.0f s of at most %.0f s (its log: %s)",
                    *(waited, _START_SECONDS, self._log),
                )
                next_line += SECONDS_BETWEEN_LINES
            if self._process is not None and self._process.poll() is not None:
                raise CwpoError(f"vLLM exited while starting: {self._last_words()}")
            if waited > _START_SECONDS:
                self.stop()
                raise CwpoError(f"vLLM was not healthy within {_START_SECONDS:.0f} s: {self._log}")
            time.sleep(0.5)
        self._watcher.start()

    def stop(self) -> None:
        """Stop it with all its processes."""
        self._stopped.set()
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _spawn(self) -> None:
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: S603
                    self._command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent(),  # noqa: PLW1509
                )
        except OSError as error:
            raise CwpoError(f"vLLM cannot be started: {self._command[0]}: {error}") from error

    def _watch(self) -> None:
        delay = 1.0
        while not self._stopped.wait(delay):
            if self._process is None or self._process.poll() is None:
                delay = 1.0
                continue
            logger.error(
                "vLLM ended with exit code %d; starting it again (its log: %s)",
                *(self._process.returncode, self._log),
            )
            self._spawn()
            delay = min(2.0 * delay, _LONGEST_BACK_OFF)

    def _is_healthy(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health", timeout=5.0).is_success
        except httpx2.TransportError:
            return False

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line]
        return f"{lines[-1] if lines else 'it said nothing'} (its log: {self._log})"
