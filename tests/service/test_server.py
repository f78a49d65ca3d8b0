import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import httpx2
import psutil
import pytest

from cwpo.errors import CwpoError
from cwpo_annotator import Annotator, CheckpointError
from cwpo_annotator.annotator import GOLDEN_ITEMS
from cwpo_annotator.backends.null import NullBackend
from cwpo_service.app import create_app
from cwpo_service.server import Server, listen
from cwpo_service.settings import ServeSettings
from harness import TIMEOUT, lives, url_in


def test_while_the_model_loads_the_service_is_up_but_not_ready(serve, triplet, problem):
    loaded = threading.Event()

    def factory():
        assert loaded.wait(TIMEOUT)
        return Annotator.null()

    with serve(factory, wait=False) as service:
        assert service.http.get("/health/live").status_code == 200
        for answer in (
            service.http.get("/health/ready"),
            service.http.get("/model"),
            service.annotate(triplet()),
        ):
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert problem(answer)["detail"] == "the service is loading"
        loaded.set()
        while service.http.get("/health/ready").status_code != 200:
            pass
        assert service.annotate(triplet()).status_code == 200


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CheckpointError("runs/x: no such folder"), "^runs/x: no such folder$"),
        (RuntimeError("CUDA out of memory\nmore"), "cannot be loaded: RuntimeError: CUDA out of m"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_server(error, message):
    def factory():
        raise error

    settings = ServeSettings(backend="null", port=0)
    with listen(settings.host, settings.port) as listener, pytest.raises(CwpoError, match=message):
        Server(create_app(settings, factory), settings.drain_seconds).serve_on(listener)


def test_a_stopping_service_answers_what_it_accepted_and_nothing_new(
    serve, annotator_with, gated, triplet, problem
):
    answers = []
    with serve(lambda: annotator_with(gated)) as service:
        asking = threading.Thread(target=lambda: answers.append(service.annotate(triplet())))
        asking.start()
        assert gated.entered.acquire(timeout=TIMEOUT)
        service.server.should_exit = True
        while service.http.get("/health/ready").status_code == 200:
            pass
        for answer in (service.http.get("/health/ready"), service.annotate(triplet())):
            assert answer.status_code == 503
            assert problem(answer)["detail"] == "the service is draining"
            assert int(answer.headers["retry-after"]) >= 1
        gated.gate.set()
        asking.join(TIMEOUT)
    assert [answer.status_code for answer in answers] == [200]


def status_of(service, triplet):
    """The status of an answer, None without one."""
    try:
        return service.annotate(triplet).status_code
    except httpx2.TransportError:
        return None


@pytest.mark.slow
def test_draining_ends_when_its_time_is_up(serve, annotator_with, gated, triplet):
    statuses = []
    with serve(lambda: annotator_with(gated), drain_seconds=0.1) as service:
        asking = threading.Thread(target=lambda: statuses.append(status_of(service, triplet())))
        asking.start()
        assert gated.entered.acquire(timeout=TIMEOUT)
        service.stop()
        asking.join(TIMEOUT)
    assert statuses != [200]


@pytest.mark.slow
def test_the_backend_is_closed_only_after_the_batch_that_it_is_at(
    serve, annotator_with, gated, triplet
):
    done = []
    score, gated.close = gated.score_pairs, lambda: done.append("closed")

    def score_pairs(pairs):
        scores = score(pairs)
        done.append("scored")
        return scores

    gated.score_pairs = score_pairs
    with serve(lambda: annotator_with(gated), drain_seconds=0.1) as service:
        asking = threading.Thread(target=status_of, args=[service, triplet()])
        asking.start()
        assert gated.entered.acquire(timeout=TIMEOUT)
        service.stop()
        assert not service.app.state.service.is_idle
        assert done == []
        gated.gate.set()
        asking.join(TIMEOUT)
        while len(done) < 2:
            pass
    assert done == ["scored", "closed"]


@pytest.fixture
def command():
    """Run `cwpo ARGUMENTS` in a process; killed at the end if it is still there."""
    processes = []

    def start(*arguments, **environment):
        process = subprocess.Popen(
            [sys.executable, "-m", "cwpo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_serves_until_a_signal_and_exits_with_0(command, triplet, number):
    process = command("serve", "--backend", "null", CWPO_PORT="0")
    ready = process.stdout.readline()
    url = url_in(ready)
    answer = httpx2.post(f"{url}/annotate", json={"triplets": [triplet()]}, timeout=TIMEOUT)
    assert answer.status_code == 200
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, stdout, stderr) == (0, "", "")
    assert ready == f"cwpo serve: null is ready at {url} (null on cpu in float32)\n"


def pieces_of(output):
    """What is written, until nobody is left who could write."""
    with suppress(OSError):  # Which is how a terminal ends.
        while piece := os.read(output, 1 << 16):
            yield piece


@pytest.mark.slow
@pytest.mark.parametrize("open_output", [os.pipe, os.openpty], ids=["pipe", "terminal"])
def test_serving_a_model_prints_that_it_loads_and_that_it_is_ready(tiny_annotator, open_output):
    reading, writing = open_output()
    arguments = [
        "serve",
        "--annotator",
        str(tiny_annotator),
        "--device",
        "cpu",
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "cwpo", *arguments], stdout=writing, stderr=writing
    )
    os.close(writing)
    printed = ""
    try:
        for piece in pieces_of(reading):
            printed += piece.decode()
            if "is ready" in printed:
                process.terminate()
        assert process.wait(TIMEOUT) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reading)
    url = url_in(printed)
    assert printed.splitlines() == [
        f"cwpo serve: loading {tiny_annotator}",
        f"cwpo serve: {tiny_annotator.name} is ready at {url} (torch on cpu in float32)",
    ]


@pytest.mark.slow
def test_a_busy_port_is_one_line(command):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        process = command("serve", "--backend", "null", "--port", str(port))
        _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert stderr.startswith(f"cwpo serve: 127.0.0.1:{port} is in use: ")
    assert stderr.count("\n") == 1


@pytest.mark.slow
def test_the_start_of_vllm_is_told_and_its_end_too(command, tiny_annotator, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho there is no GPU here\nexit 1\n")
    python.chmod(0o755)
    flags = ("--backend", "vllm", "--vllm-python", str(python), "--port", "0")
    process = command("serve", "--annotator", str(tiny_annotator), *flags)
    stdout, stderr = process.communicate(timeout=TIMEOUT)
    loading, waiting, error = stderr.splitlines()
    assert loading == f"cwpo serve: loading {tiny_annotator}"
    assert " warning waiting for vLLM to start: 0 s of at most 600 s (its log: " in waiting
    assert error.startswith("cwpo serve: vLLM exited while starting: there is no GPU here (")
    assert (process.returncode, stdout) == (1, "")


# Answers as a vLLM server does, with the same scores whatever it is asked.
VLLM = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

known = json.loads(Path(__file__).with_suffix(".json").read_text())
score_of = {tuple(ids): score for ids, score in known}

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer([{"id": "annotator"}])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = [score_of[tuple(ids)] for ids in body["input"]]
        self.answer([{"index": i, "probs": [score]} for i, score in enumerate(scores)])

    def answer(self, data):
        content = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.slow
def test_in_a_log_of_json_the_end_of_vllm_is_json_too(command, tiny_annotator, tmp_path):
    annotator = Annotator.load(tiny_annotator, device="cpu", dtype="float32")
    texts = annotator.encode_texts(GOLDEN_ITEMS)
    scores = annotator.score_texts(texts).values.tolist()
    known = [(list(text.ids), score) for text, score in zip(texts, scores, strict=True)]
    (tmp_path / "python.json").write_text(json.dumps(known))
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}{VLLM}")
    python.chmod(0o755)
    flags = ("--backend", "vllm", "--vllm-python", str(python), "--port", "0")
    log = ("--log-format", "json")
    process = command("serve", "--annotator", str(tiny_annotator), *flags, *log)

    def servers():
        children = psutil.Process(process.pid).children()
        return [child for child in children if lives(child)]

    assert url_in(process.stdout.readline())
    (first,) = servers()
    first.kill()
    while servers() in ([], [first]):
        time.sleep(0.05)
    process.terminate()
    _, stderr = process.communicate(timeout=TIMEOUT)
    lines = [json.loads(line) for line in stderr.splitlines()]
    (line,) = [line for line in lines if line["message"].startswith("vLLM ended with exit code -9")]
    assert (line["level"], line["logger"]) == ("error", "cwpo_annotator")


@pytest.mark.slow
def test_an_unknown_model_is_one_line(command, tmp_path):
    missing = tmp_path / "missing"
    process = command("serve", "--annotator", str(missing), "--port", "0")
    _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    loading, error = stderr.splitlines()
    assert loading == f"cwpo serve: loading {missing}"
    assert error == f"cwpo serve: {missing}: no such folder (and a Hub id looks like owner/name)"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--annotator is missing"),
        (["--backend", "null", "--host", "0.0.0.0"], "needs --api-keys-file"),
        (["--backend", "null", "--redis-url", "redis://x"], "both --redis-url and --store-url"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(command, arguments, line):
    process = command("serve", *arguments)
    _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert line in stderr
    assert stderr.count("\n") == 1


@pytest.mark.slow
def test_the_null_backend_never_imports_torch(tmp_path):
    program = """
import sys, threading, httpx2
from cwpo_service.app import create_app
from cwpo_service.commands import Serve
from cwpo_service.scoring.loading import load_annotator
from cwpo_service.server import Server, listen
settings = Serve(backend="null", port=0)
with listen(settings.host, 0) as listener:
    url = "http://127.0.0.1:%d" % listener.getsockname()[1]
    app = create_app(settings, lambda: load_annotator(settings))
    server = Server(app, settings.drain_seconds)
    thread = threading.Thread(target=server.serve_on, args=[listener])
    thread.start()
    with httpx2.Client(base_url=url, timeout=120) as http:
        while http.get("/health/ready").status_code != 200: pass
        body = {"triplets": [{"prompt": "p", "response_a": "x", "response_b": "y"}]}
        assert http.post("/annotate", json=body).status_code == 200
    server.should_exit = True
    thread.join()
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_store_being_away_is_seen_by_readiness(serve, tmp_path, problem):
    store = tmp_path / "store"
    with serve(wait=False, redis_url="redis://127.0.0.1:9/0", store_url=str(store)) as service:
        while "loading" in (answer := service.http.get("/health/ready?for=jobs")).text:
            pass
        assert answer.status_code == 503
        assert "queue" in problem(answer)["detail"]
        answer = service.http.get("/jobs")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert service.http.get("/health/live").status_code == 200


def test_a_dead_batcher_is_seen_by_liveness_and_keeps_nobody_waiting(serve, triplet, problem):
    with serve() as service:
        service.app.state.service.close()
        while service.http.get("/health/live").status_code == 200:
            pass
        answer = service.annotate(triplet())
        assert answer.status_code == 503
        assert "batcher has failed" in problem(answer)["detail"]


class Mortal(NullBackend):
    """Scores until it is hit, and never again, as a process that has lost its GPU."""

    def __init__(self):
        self.is_hit = False

    def score_pairs(self, pairs):
        self.is_hit = self.is_hit or len(pairs) > 2
        if self.is_hit:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().score_pairs(pairs)


def test_a_dead_backend_is_seen_by_liveness(serve, annotator_with, triplet, problem):
    with serve(lambda: annotator_with(Mortal())) as service:
        assert service.annotate(triplet(1)).status_code == 200
        assert service.annotate(*map(triplet, range(3))).status_code == 500
        while (answer := service.http.get("/health/live")).status_code == 200:
            pass
        assert answer.status_code == 503
        assert "backend" in problem(answer)["detail"]
        assert service.http.get("/health/ready").status_code == 503
        answer = service.annotate(triplet(1))
        assert answer.status_code == 503
        assert "restarted" in problem(answer)["detail"]


def test_idle_connections_are_closed_by_the_client_and_not_under_its_next_request(service):
    client = httpx2.Limits().keepalive_expiry
    assert client is not None
    assert service.server.config.timeout_keep_alive > client
