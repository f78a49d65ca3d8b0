"""Running steps: each command in a process of its own, none whose output is there already."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import httpx2

from cwpo.errors import CwpoError
from cwpo.exit_codes import ExitCode
from cwpo.process import die_with_parent, free_port
from cwpo_trainer.reproduction.step import KINDS, SHOWN_PORT, Output, Step
from cwpo_trainer.run.process import threads_each

_STARTUP_SECONDS = 600.0
# Folder of the outputs of steps, below that of all.
STEPS = "steps"
# Settings of a step are those that are shown: none is from the environment.
_PREFIX = "CWPO_"
# But for what is no setting: a secret.
_KEPT = {"CWPO_LLM_JUDGE_KEY"}
_LAST_LINES = 5
_PROGRAM = (sys.executable, "-m", "cwpo")


class StepError(CwpoError):
    """A command failed; its log says why."""


class Runner:
    """Runs steps, several at a time.

    Args:
        root: folder of the outputs.
        at_once: number of steps; each has its share of the cores.
    """

    def __init__(self, root: Path, *, at_once: int = 1) -> None:
        self._root = root
        self._at_once = at_once
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._is_ending = False

    def run(self, steps: Sequence[Step]) -> Generator[tuple[Step, StepError | None]]:
        """Run those that are not there; yields each once it is, or with the reason why it is not.

        A step that needs one that has failed fails for the same reason.

        Args:
            steps: each after all that it needs; of those that could run, the first one does.
        """
        waiting = [*steps]
        outcome: dict[str, StepError | None] = {}
        running: dict[Future[None], Step] = {}
        with ThreadPoolExecutor(self._at_once, thread_name_prefix="step") as pool, self._ending():
            while waiting or running:
                for step in tuple(waiting):
                    needed = [each.name for each in step.inputs]
                    error = next((outcome[each] for each in needed if outcome.get(each)), None)
                    if error is not None or step.path(self._root).exists():
                        waiting.remove(step)
                        outcome[step.name] = error
                        yield step, error
                    elif len(running) < self._at_once and outcome.keys() >= set(needed):
                        waiting.remove(step)
                        number = len(steps) - len(waiting)
                        print(f"{step.command} {step.name} ({number} of {len(steps)})", flush=True)
                        running[pool.submit(self._step, step)] = step
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    step = running.pop(future)
                    outcome[step.name] = _failure_of(future)
                    yield step, outcome[step.name]

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """On an error, end all processes: trainings save a checkpoint first."""
        try:
            yield
        except BaseException:
            with self._lock:
                self._is_ending = True
                for process in self._processes:
                    process.terminate()
            raise

    def _step(self, step: Step) -> None:
        """Run one command, whose inputs are there; an interrupted one goes on from its checkpoint.

        What it prints goes to a log beside its output.
        Raises: StepError with the last lines of the log.
        """
        root = self._root
        root.mkdir(parents=True, exist_ok=True)
        for path, text in step.settings_files(root).items():
            path.write_text(text)
        log = root / f"{step.name}.log"
        with log.open("ab") as sink, self._service(step, sink.fileno()) as url:
            command = [*_PROGRAM, *step.words(root), *_resumed(step), *_at(url)]
            if step.gpus > 1:
                command = _torchrun(step, command)
            with self._process(command, sink.fileno()) as process:
                status = process.wait()
        if status != 0 or not step.path(root).exists():
            said = log.read_text(errors="replace").split("\n")[-_LAST_LINES:]
            why = " | ".join(said).strip(" |")
            raise StepError(f"cwpo {step.command} failed: {why}; see {log}")

    @contextmanager
    def _process(self, command: Sequence[str], log: int) -> Iterator[subprocess.Popen[bytes]]:
        """The command in a process of its own, which ends with this one.

        Raises: StepError if all are being ended.
        """
        with self._lock:
            if self._is_ending:
                raise StepError("stopped")
            process = subprocess.Popen(  # noqa: S603
                command,
                stdout=log,
                stderr=log,
                env=self._environment(),
                preexec_fn=die_with_parent(),  # noqa: PLW1509
            )
            self._processes.add(process)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()
            with self._lock:
                self._processes.remove(process)

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in _KEPT or not name.startswith(_PREFIX)
        }
        if self._at_once > 1:
            kept.setdefault("OMP_NUM_THREADS", str(threads_each(self._at_once)))
        return kept

    @contextmanager
    def _service(self, step: Step, log: int) -> Iterator[str | None]:
        """The address of a service that hosts the annotator of the step; None for a step without.

        Raises: StepError.
        """
        if step.serves is None:
            yield None
            return
        port = free_port()
        command = [*_PROGRAM, *_serve_words(step.serves, self._root, port)]
        with self._process(command, log) as process:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url)
            yield url


def shown(step: Step, root: Path) -> str:
    """The commands of a step, as one types them."""
    lines = [
        f"cat > {shlex.quote(str(path))} <<'END'\n{text}END"
        for path, text in step.settings_files(root).items()
    ]
    words = [*step.words(root), *_at(f"http://127.0.0.1:{SHOWN_PORT}" if step.serves else None)]
    command = ["cwpo", *words]
    if step.gpus > 1:
        command = _torchrun(step, command)
    if step.serves is None:
        return "\n".join([*lines, shlex.join(command)])
    served = shlex.join(["cwpo", *_serve_words(step.serves, root, SHOWN_PORT)])
    return "\n".join([*lines, f"{served} &", shlex.join(command), "kill %1"])


@contextmanager
def ending_with_sigterm() -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C: with what runs, which saves its checkpoints first."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _failure_of(future: Future[None]) -> StepError | None:
    error = future.exception()
    if error is not None and not isinstance(error, StepError):
        raise error
    return error


def _torchrun(step: Step, command: Sequence[str]) -> list[str]:
    """The command on several GPUs: the words after its name are those of its module."""
    module = KINDS[step.command].module
    words = command[command.index(step.command) + 1 :]
    launched = ["torchrun", "--nproc-per-node", str(step.gpus), "--shutdown-timeout", "600"]
    return [*launched, "-m", str(module), *words]


def _resumed(step: Step) -> list[str]:
    return ["--resume"] if KINDS[step.command].resumes else []


def _at(url: str | None) -> list[str]:
    return [] if url is None else ["--url", url]


def _serve_words(annotator: Output | str, root: Path, port: int) -> list[str]:
    path = annotator
    if isinstance(annotator, Output):
        path = str(annotator.step.path(root) / annotator.file)
    return ["serve", "--annotator", str(path), "--port", str(port)]


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _STARTUP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StepError("`cwpo serve` ended before it was ready: is cwpo-service installed?")
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/health/ready").is_success:
                return
        time.sleep(0.5)
    raise StepError(f"`cwpo serve` was not ready within {_STARTUP_SECONDS:.0f} s")
