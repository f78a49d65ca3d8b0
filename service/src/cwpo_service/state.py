"""The parts of a running service, and how they are connected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cwpo.certificates import certificate_of
from cwpo.types import Certificate, ModelInfo, ModelRef
from cwpo_annotator.annotator import Annotator
from cwpo_service.access.keys import KeysFile
from cwpo_service.access.rate_limit import RateLimit
from cwpo_service.http.single_flight import SingleFlight
from cwpo_service.scoring.admission import Admission
from cwpo_service.scoring.batcher import Batcher
from cwpo_service.scoring.device import Device
from cwpo_service.scoring.hosting import Hosting
from cwpo_service.scoring.inference import Inference
from cwpo_service.settings import ServeSettings
from cwpo_service.telemetry.metrics import Metrics
from cwpo_worker.jobs.dataset import MERGED_BYTES, MERGED_ROWS
from cwpo_worker.jobs.ledger import Ledger
from cwpo_worker.jobs.lifecycle import Lifecycle
from cwpo_worker.queue.connection import connect
from cwpo_worker.reviews.reviews import Reviews
from cwpo_worker.storage.inputs import InputPrefix
from cwpo_worker.storage.store import BlobStore
from cwpo_worker.storage.uploads import FileCatalog

_REDIS_SECONDS = 5.0


@dataclass(frozen=True)
class JobStores:
    """Access to files, batch jobs and reviews. All calls block, so make them on a thread.

    url_seconds: how long presigned URLs of a dataset's parts are valid; None for no such URLs.
    check: raises StoreError or QueueUnavailableError if the store or the queue is unreachable, or
        if no worker looks after the jobs.
    """

    files: FileCatalog
    ledger: Ledger
    reviews: Reviews
    url_seconds: int | None
    check: SingleFlight[None]

    @classmethod
    def open(
        cls,
        redis_url: str,
        store_url: str,
        input_prefix: str | None,
        key_file_bytes: int | None,
        key_waiting_rows: int | None,
        url_seconds: int | None,
    ) -> JobStores:
        """Connect to the queue and the store at these URLs; neither has to be reachable yet.

        Args:
            input_prefix: folder or URL of files that jobs may read without an upload; None
                allows uploaded files only.
            key_file_bytes, key_waiting_rows: quotas of each API key; None for no limit.
            url_seconds: how long presigned URLs of a dataset's parts are valid; None for no URLs.
        """
        redis = connect(redis_url, timeout=_REDIS_SECONDS)
        store = BlobStore(store_url)
        inputs = None if input_prefix is None else InputPrefix(input_prefix)
        files = FileCatalog(store, key_file_bytes)
        ledger = Ledger(redis, store, Lifecycle(redis, store), files, inputs, key_waiting_rows)

        def check() -> None:
            store.check()
            ledger.check()

        return cls(
            files,
            ledger,
            Reviews(redis, store, ledger),
            url_seconds,
            SingleFlight(check, "jobs-check"),
        )


@dataclass(frozen=True)
class Service:
    """The parts of a running service; `jobs` is None if it does not accept batch jobs.

    metrics_text: the metrics in the format of Prometheus.
    backend_check: raises BackendUnavailableError if the backend cannot score.
    """

    metrics: Metrics
    metrics_text: SingleFlight[bytes]
    backend_check: SingleFlight[None]
    keys: KeysFile
    rate_limit: RateLimit
    device: Device
    hosting: Hosting
    batcher: Batcher
    admission: Admission
    inference: Inference
    jobs: JobStores | None
    max_triplets: int
    max_body_bytes: int
    drift_limit: float

    @classmethod
    def build(cls, settings: ServeSettings, load: Callable[[str], Annotator]) -> Service:
        """Build all parts of the service, without starting them.

        Args:
            settings: all settings; each part receives only its own.
            load: loads an annotator by its name when POST /model changes the model.
        Raises: ConfigError for an API key file that cannot be read.
        """
        metrics = Metrics()
        device = Device()
        hosting = Hosting(device, load, metrics.drift)
        batcher = Batcher(
            device,
            metrics,
            budget=lambda: settings.token_budget or hosting.batch_tokens,
            probe=hosting.probe,
            stuck_seconds=settings.stuck_seconds,
        )
        admission = Admission(hosting, batcher, bound=settings.queue_tokens)
        metrics.watch_queue(lambda: admission.waiting, lambda: batcher.queue_age)
        metrics.watch_padding(hosting.padding)
        jobs = redis_url = None
        if settings.redis_url is not None and settings.store_url is not None:
            redis_url = settings.redis_url.get_secret_value()
            jobs = JobStores.open(
                redis_url,
                settings.store_url,
                settings.input_prefix,
                settings.key_file_bytes,
                settings.key_waiting_rows,
                settings.presigned_seconds,
            )
            metrics.watch_jobs(jobs.ledger)
        return cls(
            metrics=metrics,
            metrics_text=SingleFlight(metrics.render, "metrics"),
            backend_check=SingleFlight(hosting.check, "backend-check"),
            keys=KeysFile(settings.api_keys_file),
            rate_limit=RateLimit(settings.requests_per_minute, redis_url),
            device=device,
            hosting=hosting,
            batcher=batcher,
            admission=admission,
            inference=Inference(
                hosting, admission, batcher, metrics, max_triplets=settings.max_triplets
            ),
            jobs=jobs,
            max_triplets=settings.max_triplets,
            max_body_bytes=settings.max_body_bytes,
            drift_limit=settings.drift_limit,
        )

    def model_info(self) -> ModelInfo:
        """The loaded annotator and the limits of requests.

        Raises: ProblemError, 503 while no annotator is loaded.
        """
        annotator = self.hosting.annotator
        return ModelInfo(
            **annotator.model.model_dump(),
            backend=annotator.backend.name,
            device=annotator.backend.device,
            dtype=annotator.backend.dtype,
            max_length=annotator.encoder.max_length,
            max_triplets=self.max_triplets,
            max_body_bytes=self.max_body_bytes,
            max_merged_rows=None if self.jobs is None else MERGED_ROWS,
            max_merged_bytes=None if self.jobs is None else MERGED_BYTES,
            temperature=annotator.temperature,
            confidence_quantiles=annotator.confidence_quantiles,
            certificates=[*annotator.certificates],
            certificates_void=self.metrics.drift.excess(self.drift_limit),
        )

    def certified_by(self, max_error: float) -> tuple[ModelRef, Certificate]:
        """The loaded annotator and its certificate of this max_error.

        Raises: ConfigError if there is none, or if it does not hold for what is annotated now.
        """
        model = self.model_info()
        return model.ref(), certificate_of(
            model.certificates, max_error, void=model.certificates_void
        )

    @property
    def is_idle(self) -> bool:
        """Whether no thread of the service is loading, tokenising or scoring."""
        is_scoring = self.batcher.scoring_seconds > 0
        return self.hosting.is_idle and self.admission.is_idle and not is_scoring

    def close(self) -> None:
        """Stop the threads; the annotator is freed after the device has scored its last batch."""
        self.hosting.close()
        self.batcher.stop()
        self.device.stop()
        self.inference.close()
        self.metrics_text.close()
        self.backend_check.close()
        if self.jobs is not None:
            self.jobs.check.close()
