"""Running steps: each command in a process of its own, none whose output is there already."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

from cwpo.errors import CwpoError
from cwpo.exit_codes import ExitCode
from cwpo.process import die_with_parent, free_port
from cwpo_trainer.reproduction.step import KINDS, SHOWN_PORT, Output, Step, in_order

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


def run_steps(steps: Sequence[Step], root: Path) -> None:
    """Run the steps and all that they need, in order.

    Raises: StepError for the first that fails; what is done stays done.
    """
    for step in in_order(steps):
        if not step.path(root).exists():
            run_step(step, root)


def run_step(step: Step, root: Path) -> None:
    """Run one command, whose inputs are there; an interrupted one goes on from its checkpoint.

    What it prints goes to a log beside its output.
    Raises: StepError with the last lines of the log.
    """
    root.mkdir(parents=True, exist_ok=True)
    for path, text in step.settings_files(root).items():
        path.write_text(text)
    log = root / f"{step.name}.log"
    with log.open("ab") as sink, _service(step, root, sink.fileno()) as url:
        command = [*_PROGRAM, *step.words(root), *_resumed(step), *_at(url)]
        if step.gpus > 1:
            command = _torchrun(step, command)
        status = _run(command, sink.fileno())
    if status != 0 or not step.path(root).exists():
        said = " | ".join(log.read_text(errors="replace").split("\n")[-_LAST_LINES:]).strip(" |")
        raise StepError(f"cwpo {step.command} failed: {said}; see {log}")


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
    """End on SIGTERM as on Ctrl-C: with the command that runs, which saves its checkpoint first."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: Sequence[str], log: int) -> int:
    """The exit status of the command."""
    process = _started(command, log)
    try:
        return process.wait()
    except BaseException:
        # Trainings save a checkpoint first.
        process.terminate()
        process.wait()
        raise


def _started(command: Sequence[str], log: int) -> subprocess.Popen[bytes]:
    """The command in a process of its own, which ends with this one."""
    return subprocess.Popen(  # noqa: S603
        command,
        stdout=log,
        stderr=log,
        env=_environment(),
        preexec_fn=die_with_parent(),  # noqa: PLW1509
    )


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


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not name.startswith(_PREFIX)
    }


def _serve_words(annotator: Output | str, root: Path, port: int) -> list[str]:
    path = annotator
    if isinstance(annotator, Output):
        path = str(annotator.step.path(root) / annotator.file)
    return ["serve", "--annotator", str(path), "--port", str(port)]


@contextmanager
def _service(step: Step, root: Path, log: int) -> Iterator[str | None]:
    """The address of a service that hosts the annotator of the step; None for a step without."""
    if step.serves is None:
        yield None
        return
    port = free_port()
    command = [*_PROGRAM, *_serve_words(step.serves, root, port)]
    process = _started(command, log)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url)
        yield url
    finally:
        process.terminate()
        process.wait()


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
