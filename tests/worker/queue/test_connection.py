"""Redis or Valkey by URL: passwords, and TLS through a proxy that ends it before a real Valkey."""

import os
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
import redis

from cwpo_worker.errors import QueueUnavailableError
from cwpo_worker.queue.connection import connect, queue_errors
from harness import TIMEOUT


class TlsProxy(threading.Thread):
    """Takes TLS connections and passes their bytes on to a server on this machine."""

    def __init__(self, certificate, server_port):
        super().__init__(daemon=True)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._server_port = server_port
        self.port = self._listener.getsockname()[1]

    def run(self):
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client):
        with (
            suppress(OSError),
            self._context.wrap_socket(client, server_side=True) as secure,
            socket.create_connection(("127.0.0.1", self._server_port)) as server,
        ):
            threading.Thread(target=pump, args=[server, secure], daemon=True).start()
            pump(secure, server)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def pump(source, sink):
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def tls(house, tmp_path):
    """The house's Valkey over TLS: its URL with and without the authority to trust."""
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    plain = urlsplit(house.valkey.url)
    proxy = TlsProxy(authority.issue_cert("127.0.0.1"), plain.port)
    proxy.start()
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    url = f"rediss://:{plain.password}@127.0.0.1:{proxy.port}/0"
    yield f"{url}?ssl_ca_certs={path}", url
    proxy.close()


def cwpo(command, house, redis_url, **environment):
    return subprocess.run(
        [sys.executable, "-m", "cwpo", *command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env={
            **os.environ,
            "CWPO_URL": house.service.url,
            "CWPO_REDIS_URL": redis_url,
            "CWPO_STORE_URL": house.store_url,
            **environment,
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_a_job_is_done_over_tls_with_a_password(house, tls, scheme):
    trusted, _ = tls
    job_id = house.submit(house.rows(3))
    # The reconciler of a burst finds it, then the queue gives it.
    house.queue.rq.empty()
    done = cwpo(["worker", "--burst"], house, trusted.replace("rediss", scheme))
    assert (done.returncode, done.stderr) == (0, "")
    assert house.ledger.get(job_id, owner=None).state == "completed"


def test_a_certificate_of_an_unknown_authority_is_refused(house, tls):
    _, untrusted = tls
    done = cwpo(["worker", "--burst"], house, untrusted)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "CERTIFICATE_VERIFY_FAILED" in line


def test_a_certificate_for_another_name_is_refused(tls):
    with pytest.raises(QueueUnavailableError, match="CERTIFICATE_VERIFY_FAILED"), queue_errors():
        connect(tls[0].replace("127.0.0.1", "localhost")).ping()


@pytest.mark.slow
@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("password", ["wrong", ""])
def test_a_wrong_password_is_one_line_without_the_password(house, tls, secure, password):
    url = tls[0] if secure else house.valkey.url
    right = urlsplit(url).password
    done = cwpo(["worker", "--burst"], house, url.replace(right, password))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "does not accept the user or password of --redis-url" in line
    assert right not in line
    assert "wrong" not in line.replace("WRONGPASS", "")


def test_a_url_that_is_none_is_refused():
    with pytest.raises(QueueUnavailableError, match="--redis-url"):
        connect("http://127.0.0.1:6379")


def test_the_client_opens_no_connection_by_itself():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        client = connect(f"redis://127.0.0.1:{server.getsockname()[1]}/0", timeout=0.01)
        with pytest.raises(BlockingIOError):
            server.accept()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        server.accept()[0].close()
