"""The settings of the service, read by its commands and used to build its app."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, Field, SecretStr, model_validator

from cwpo_annotator.annotator import DType

BackendName = Literal["torch", "vllm", "null"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


class AnnotatorSettings(BaseModel, extra="forbid", frozen=True):
    """The annotator to host, and the backend that computes its scores."""

    annotator: str | None = Field(
        None,
        description="Annotator to serve: a checkpoint folder, or the id of a model on the "
        "Hugging Face Hub (owner/name).",
    )
    backend: BackendName = Field(
        "torch",
        description="Backend that computes the scores: `torch` in this process, or a `vllm` "
        "server; `null` derives scores from a hash of the texts, for load tests.",
    )
    vllm_url: str | None = Field(
        None, description="URL of a running vLLM server, for --backend vllm."
    )
    vllm_python: Path | None = Field(
        None,
        description="Python interpreter of an environment with vLLM, for --backend vllm to start "
        "a vLLM server of its own.",
    )
    vllm_arguments: str = Field(
        "",
        description="Additional command-line arguments of the vLLM server that --vllm-python "
        "starts.",
    )
    dtype: DType = Field(
        "auto",
        description="Number format of the weights: `auto` picks bfloat16 on a GPU that has it, and "
        "float32 elsewhere; `int8` needs a checkpoint that `cwpo quantize` wrote.",
    )
    device: str = Field(
        "auto",
        description="Device that the annotator runs on: `cuda`, `mps` or `cpu`; `auto` picks the "
        "fastest available one.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads that the annotator computes with; by default, one per physical "
        "core.",
    )

    @model_validator(mode="after")
    def _loadable(self) -> Self:
        if self.backend != "null" and self.annotator is None:
            raise ValueError("--annotator is missing: name a checkpoint folder or a Hub id")
        if self.backend == "vllm" and (self.vllm_url is None) == (self.vllm_python is None):
            raise ValueError(
                "--backend vllm needs --vllm-url of a running server, or --vllm-python of the "
                "environment to start one from"
            )
        if self.backend == "vllm" and self.dtype == "int8":
            raise ValueError("--dtype int8 needs --backend torch")
        return self


class ServeSettings(AnnotatorSettings):
    """The annotator to host, the addresses to listen on, and the limits of requests."""

    host: str = Field(
        "127.0.0.1",
        description="Address to listen on; any but a loopback address needs --api-keys-file.",
    )
    port: int = Field(
        8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one."
    )
    health_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Separate TCP port for /health and /metrics, which --port then no longer "
        "serves; 0 picks a free one.",
    )
    allowed_hosts: str | None = Field(
        None,
        description="Host names for which requests are answered, besides IP addresses and "
        "localhost, separated by commas; `*.example.org` allows all names below a domain, `*` all "
        "names. By default all with --api-keys-file, and none without.",
    )
    api_keys_file: Path | None = Field(
        None,
        description="File of API keys, one per line: `name:sha256hex` or "
        "`name:sha256hex:scope,scope`; required unless --host is a loopback address.",
    )
    redis_url: SecretStr | None = Field(
        None,
        description="URL of the Redis or Valkey server of the job queue (rediss:// for TLS); "
        "batch jobs need it and --store-url.",
    )
    store_url: str | None = Field(
        None,
        description="Folder or fsspec URL (such as s3://bucket/folder) of uploaded files and job "
        "results; batch jobs need it and --redis-url.",
    )
    input_prefix: str | None = Field(
        None,
        description="Folder or fsspec URL with files that jobs may read without an upload; every "
        "API key with the scope `jobs` may read all of it.",
    )
    presigned_seconds: int | None = Field(
        None,
        ge=1,
        le=7 * 24 * 3600,
        description="Seconds for which presigned URLs of a dataset's parts are valid, with which "
        "clients download from an object store directly; by default no such URLs are given.",
    )
    max_triplets: int = Field(1024, ge=1, description="Maximum number of triplets in a request.")
    max_body_bytes: int = Field(
        16 << 20,
        ge=1,
        description="Maximum size of a request's body in bytes, after decompression; uploads have "
        "--max-file-bytes.",
    )
    max_file_bytes: int = Field(
        64 << 30, ge=1, description="Maximum size of an uploaded file in bytes."
    )
    queue_tokens: int = Field(
        4 << 20,
        ge=1,
        description="Maximum number of tokens that wait to be read; further requests are "
        "refused with 429 and Retry-After.",
    )
    token_budget: int | None = Field(
        None,
        ge=1,
        description="Maximum number of tokens that are read in a batch; by default, 65536 on a "
        "GPU and for vLLM, 2048 per core on a CPU.",
    )
    stuck_seconds: float = Field(
        300.0,
        gt=0,
        description="Seconds after which an unfinished batch makes /health/live fail.",
    )
    drift_limit: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Largest drift of confidences, `cwpo_confidence_drift`, with which the "
        "annotator's certificates hold.",
    )
    requests_per_minute: int | None = Field(
        None,
        ge=1,
        description="Maximum number of requests per minute for each API key; by default no limit.",
    )
    key_file_bytes: int | None = Field(
        None,
        ge=1,
        description="Maximum total size in bytes of the uploaded files of each API key; by default "
        "no limit.",
    )
    key_waiting_rows: int | None = Field(
        None,
        ge=1,
        description="Number of waiting rows from which on an API key may submit no further job, "
        "which is refused with 429 and Retry-After; by default no limit.",
    )
    log_format: LogFormat = Field(
        "text",
        description="Format of the log on standard error: `text` for people, `json` for one JSON "
        "object per line.",
    )
    log_level: LogLevel = Field(
        "warning",
        description="Lowest level that is logged; `info` adds a line for every answered request.",
    )
    traces: bool = Field(
        False,
        description="Send OpenTelemetry traces of requests to the collector that the environment "
        "variable OTEL_EXPORTER_OTLP_ENDPOINT names; needs the extra `otel` of cwpo-service.",
    )
    drain_seconds: float = Field(
        30.0,
        ge=0,
        description="Seconds to answer accepted requests after SIGTERM or Ctrl-C.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.health_port and self.health_port == self.port:
            raise ValueError(
                "--health-port is the same as --port: leave it out to have both on one port"
            )
        if (self.redis_url is None) != (self.store_url is None):
            raise ValueError(
                "batch jobs need both --redis-url and --store-url: give both or neither"
            )
        if self.api_keys_file is None and not _is_loopback(self.host):
            raise ValueError(
                f"listening on {self.host} needs --api-keys-file: without keys only a loopback "
                "address such as 127.0.0.1 is allowed"
            )
        return self

    def with_ports(self, ports: Sequence[int]) -> Self:
        """A copy with the actual ports, instead of 0, which asks the system for a free port.

        Args:
            ports: the actual --port and, if it is set, --health-port.
        """
        return self.model_copy(update=dict(zip(("port", "health_port"), ports, strict=False)))

    @property
    def answered_hosts(self) -> str:
        """--allowed-hosts, or its default.

        Without API keys, the check of the host is what keeps web pages from using the service.
        """
        if self.allowed_hosts is not None:
            return self.allowed_hosts
        return "*" if self.api_keys_file is not None else ""

    @property
    def url(self) -> str:
        """URL at which clients on this machine reach the service."""
        return self._url(self.port)

    @property
    def health_url(self) -> str:
        """URL at which probes on this machine reach the service."""
        return self._url(self.port if self.health_port is None else self.health_port)

    def _url(self, port: int) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
