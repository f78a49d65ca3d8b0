"""The one settings object of the service, shared by the command and the app."""

from __future__ import annotations

import shlex
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator

from cwpo.cli import Command
from cwpo.errors import CwpoError
from cwpo_annotator.annotator import Annotator, DType
from cwpo_service.logs import LogFormat, LogLevel

BackendName = Literal["torch", "vllm", "null"]


class ServeSettings(Command):
    """What the service hosts, where it listens and what it refuses."""

    annotator: str | None = Field(
        None, description="annotator checkpoint: a folder, or a Hub id (owner/name)"
    )
    backend: BackendName = Field(
        "torch",
        description="what scores: torch in this process, or a vLLM server; null scores by a hash, "
        "for load tests",
    )
    vllm_url: str | None = Field(None, description="a running vLLM server, for --backend vllm")
    vllm_python: Path | None = Field(
        None, description="interpreter of the environment with vLLM, to start a server of our own"
    )
    vllm_arguments: str = Field("", description="more of vLLM's command line, for such a server")
    dtype: DType = Field(
        "auto",
        description="of the weights: bfloat16 on a GPU, else float32; int8 after cwpo quantize",
    )
    device: str = Field("auto", description="cuda, mps, cpu, or the best there is")
    threads: int | None = Field(
        None, ge=1, description="of the model on a CPU; without it the physical cores there are"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    health_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port of its own for /health and /metrics, which are then at no other; "
        "0 takes a free one",
    )
    api_keys_file: Path | None = Field(
        None, description="API keys, a name:sha256hex a line; needed unless --host is loopback"
    )
    redis_url: SecretStr | None = Field(
        None,
        description="Redis or Valkey of the job queue (rediss:// for TLS); without it there are "
        "no jobs",
    )
    store_url: str | None = Field(
        None, description="folder or fsspec URL of files and results; without it there are no jobs"
    )
    input_prefix: str | None = Field(
        None,
        description="folder or fsspec URL below which jobs may name inputs that they do not "
        "upload; every key with the scope jobs may read all of it",
    )
    max_triplets: int = Field(1024, ge=1, description="triplets a request")
    max_body_bytes: int = Field(16 << 20, ge=1, description="bytes a request body, but an upload")
    max_file_bytes: int = Field(64 << 30, ge=1, description="bytes an uploaded file")
    queue_tokens: int = Field(
        4 << 20, ge=1, description="tokens that may wait; requests beyond it are told to come back"
    )
    token_budget: int | None = Field(
        None,
        ge=1,
        description="tokens a batch; without it 65536 on a GPU and for vLLM, 2048 a core of a CPU",
    )
    stuck_seconds: float = Field(
        300.0, gt=0, description="time that one batch may take before the service counts as dead"
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="requests a minute that each API key may make; without it any"
    )
    log_format: LogFormat = Field(
        "text", description="of the log on stderr: text for people, json an object a line"
    )
    log_level: LogLevel = Field(
        "warning", description="from which on to log; info has a line for every answered request"
    )
    traces: bool = Field(
        False,
        description="send OpenTelemetry traces of requests, where OTEL_EXPORTER_OTLP_ENDPOINT and "
        "the other standard variables say; needs the extra `otel`",
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="time that accepted requests have to end after SIGTERM"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.health_port and self.health_port == self.port:
            raise ValueError("--health-port is --port: leave it away to have both on one")
        if self.backend != "null" and self.annotator is None:
            raise ValueError("--annotator is missing: name a checkpoint folder or a Hub id")
        if self.backend == "vllm" and (self.vllm_url is None) == (self.vllm_python is None):
            raise ValueError(
                "--backend vllm needs --vllm-url of a running server, or --vllm-python of the "
                "environment to start one from"
            )
        if self.backend == "vllm" and self.dtype == "int8":
            raise ValueError("--dtype int8 is for --backend torch")
        if (self.redis_url is None) != (self.store_url is None):
            raise ValueError("jobs need both --redis-url and --store-url, or neither")
        if self.api_keys_file is None and not _is_loopback(self.host):
            raise ValueError(
                f"listening on {self.host} needs --api-keys-file: without keys only a loopback "
                "address such as 127.0.0.1 is allowed"
            )
        return self

    def load_annotator(self, name: str | None = None) -> Annotator:
        """The annotator of this name, or as set. Raises: CheckpointError for what is none."""
        name = name or self.annotator
        if self.backend == "null" or name is None:
            return Annotator.null()
        if self.backend == "vllm":
            return self._over_vllm(name)
        return Annotator.load(name, dtype=self.dtype, device=self.device, threads=self.threads)

    def _over_vllm(self, annotator: str) -> Annotator:
        if self.vllm_url is not None:
            return Annotator.over_vllm(annotator, self.vllm_url, dtype=self.dtype)
        from cwpo_annotator.backends.vllm_server import VllmServer

        server = VllmServer(
            Path(self.vllm_python or ""),
            annotator,
            dtype=self.dtype,
            on_cpu=self.device == "cpu",
            arguments=shlex.split(self.vllm_arguments),
        )
        try:
            server.start()
            return Annotator.over_vllm(annotator, server.url, dtype=self.dtype, server=server)
        except CwpoError:
            server.stop()
            raise

    @property
    def url(self) -> str:
        """Where clients on this machine reach the service."""
        return self._url(self.port)

    @property
    def health_url(self) -> str:
        """Where probes on this machine reach it."""
        return self._url(self.port if self.health_port is None else self.health_port)

    def _url(self, port: int) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
