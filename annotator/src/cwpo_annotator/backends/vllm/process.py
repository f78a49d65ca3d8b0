"""A process of vLLM: in an environment of its own, whose pins exclude those of the trainer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cwpo.errors import CwpoError
from cwpo.process import die_with_parent

_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
_CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
# Texts are short next to the block that vLLM takes on a CPU by default, and only whole blocks are
# shared between texts that begin alike.
CPU_ARGUMENTS = ("--enforce-eager", "--block-size", "32")
"""Of vLLM's command line, where there is no GPU."""

_SECONDS_TO_END = 10.0
# Such as "ValueError: no available memory", behind the prefix that vLLM gives its lines.
_ERROR = re.compile(r"\b\w*(Error|Exception): .*")


class VllmProcess:
    """A program that vLLM's interpreter runs, with the processes that it starts in turn.

    Args:
        python: the interpreter of the environment that holds vLLM.
        words: what it is to run, as on a command line.
        on_cpu: whether there is no GPU.
        environment: more variables.
    """

    def __init__(
        self,
        python: Path,
        words: Sequence[str],
        *,
        on_cpu: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log = Path(tempfile.mkdtemp(prefix="cwpo-vllm-")) / "vllm.log"
        self._command = [str(python), *words]
        self._environment = {**os.environ, **_ENVIRONMENT, **(environment or {})}
        if on_cpu:
            self._environment |= _CPU_ENVIRONMENT
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and before it has been started."""
        return None if self._process is None else self._process.poll()

    def start(self, *, talks: bool = False) -> subprocess.Popen[bytes]:
        """Start it, or start it again; what it prints is added to the log.

        Args:
            talks: its stdin and stdout are pipes.
        Raises: CwpoError when there is no such interpreter.
        """
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: S603
                    self._command,
                    env=self._environment,
                    stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if talks else log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=die_with_parent(),  # noqa: PLW1509
                )
        except OSError as error:
            raise CwpoError(f"vLLM cannot be started: {self._command[0]}: {error}") from error
        return self._process

    def stop(self) -> None:
        """End it with all its processes; what they held of a GPU's memory is free then."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_SECONDS_TO_END)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def last_words(self) -> str:
        """The last error in its log, or else its last line, and where the log is."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = [line for line in text.splitlines() if line]
        errors = [found[0] for line in lines if (found := _ERROR.search(line))]
        said = [*lines[-1:], *errors[-1:]] or ["it said nothing"]
        return f"{said[-1]} (its log: {self.log})"
