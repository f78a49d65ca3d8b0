"""How commands end, as scripts see it."""

import json
import signal
import subprocess
import sys
import threading

import pytest

from cwpo.exit_codes import ExitCode


def cwpo(*arguments, **how):
    return subprocess.run(
        [sys.executable, "-m", "cwpo", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **how,
    )


def test_the_codes_are_those_that_scripts_know():
    assert {code.name: code.value for code in ExitCode} == {
        "DONE": 0,
        "FAILED": 1,
        "USAGE": 2,
        "STOPPED": 75,
        "INTERRUPTED": 130,
        "UNREAD": 141,
        "TERMINATED": 143,
    }
    assert all(code.meaning.endswith(".") or code.meaning.endswith(").") for code in ExitCode)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], ExitCode.DONE),
        (["annotate", "nowhere.jsonl", "-o", "out.parquet"], ExitCode.FAILED),
        (["anotate"], ExitCode.FAILED),
        (["jobs", "list", "--no-such-flag"], ExitCode.USAGE),
        (["jobs", "show"], ExitCode.USAGE),
    ],
)
def test_a_command_ends_with_the_code_of_the_table(arguments, code):
    result = cwpo(*arguments)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["jobs", "show"], "cwpo jobs show: the following arguments are required: ID"),
        (["jobs", "list", "--limt", "4"], "cwpo jobs: unrecognized arguments: --limt 4"),
        (["annotate", "--output"], "cwpo annotate: argument --output/-o: expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_says_where_to_look(arguments, said):
    result = cwpo(*arguments)
    program = said.partition(":")[0]
    assert (result.returncode, result.stderr) == (ExitCode.USAGE, f"{said}; see {program} --help\n")


@pytest.fixture
def silent_url():
    """The url of a service that takes connections and never answers; `asked` is set by one."""
    import socket

    asked = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen():
            connection, _ = server.accept()
            connection.recv(1)
            asked.set()
            connection.recv(1 << 20)

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked


@pytest.mark.parametrize(
    ("sent", "code"),
    [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, -signal.SIGTERM)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_signal_ends_a_command_without_a_word(silent_url, sent, code):
    """A shell says 128 + 15, TERMINATED, of the latter."""
    url, asked = silent_url
    command = [sys.executable, "-m", "cwpo", "jobs", "list", "--url", url]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in a shell's background hands an ignored SIGINT down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert asked.wait(60)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (code, "")
    assert signal.SIGTERM + 128 == ExitCode.TERMINATED


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "folder"
    source = tmp_path / "pairs.jsonl"
    row = {"prompt": "p", "response_a": "a", "response_b": "b", "preferred": "a"}
    source.write_text("".join(json.dumps({**row, "prompt": str(n)}) + "\n" for n in range(4)))
    result = cwpo("data", "poison", source, "--share", "0.5", "-o", folder / "out.parquet")
    assert result.returncode == ExitCode.FAILED
    assert result.stderr == f"cwpo data: {folder}: Not a directory\n"
