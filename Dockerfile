# syntax=docker/dockerfile:1.10
# Three images from one file: docker build --target service|worker|trainer -t cwpo-service:0.2.0 .
#
# The base is pinned by tag, so that rebuilding takes in Python and Debian security fixes. For
# builds that are the same to the bit, pin its digest:
#   --build-arg BASE=python:3.12-slim-bookworm@sha256:...
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HF_HOME=/cache/huggingface \
    HOME=/tmp \
    PATH=/opt/cwpo/bin:$PATH
RUN groupadd --gid 10001 cwpo \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin cwpo \
    && install --directory --owner 10001 --group 10001 /cache /data


# An empty environment outside the final images. The base's own Python installs into it, and stays in
# this stage. What is installed are the versions that are tested together, checked by their hashes,
# but for torch, which is chosen below. In the end, sbom.cdx.json lists it all (CycloneDX).
FROM base AS build
WORKDIR /src
COPY locks locks
RUN --mount=type=cache,target=/tmp/.cache/pip \
    /usr/local/bin/python -m venv --without-pip /opt/cwpo \
    && /usr/local/bin/python -m pip install --require-hashes --requirement locks/build.txt


FROM build AS build-worker
RUN --mount=type=cache,target=/tmp/.cache/pip \
    /usr/local/bin/python -m pip --python /opt/cwpo/bin/python install \
        --no-deps --require-hashes --requirement locks/worker.txt
COPY client client
COPY worker worker
# fsspec's drivers, besides s3fs, for the stores that CWPO_STORE_URL may name, for instance "gcsfs".
ARG STORE_DRIVERS
RUN --mount=type=cache,target=/tmp/.cache/pip \
    /usr/local/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir wheels \
        ./client ./worker \
    && /usr/local/bin/python -m pip --python /opt/cwpo/bin/python install wheels/* ${STORE_DRIVERS} \
    && /usr/local/bin/python -m cyclonedx_py environment /opt/cwpo/bin/python \
        --output-reproducible --output-file /opt/cwpo/sbom.cdx.json


# On x86_64 the default torch brings CUDA. An image for CPUs:
#   --build-arg TORCH=torch==2.13.0+cpu
#   --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
FROM build AS build-torch
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/tmp/.cache/pip \
    /usr/local/bin/python -m pip --python /opt/cwpo/bin/python install "${TORCH}"


FROM build-torch AS build-service
RUN --mount=type=cache,target=/tmp/.cache/pip \
    /usr/local/bin/python -m pip --python /opt/cwpo/bin/python install \
        --no-deps --require-hashes --requirement locks/service.txt
COPY client client
COPY annotator annotator
COPY worker worker
COPY service service
ARG STORE_DRIVERS
RUN --mount=type=cache,target=/tmp/.cache/pip \
    /usr/local/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir wheels \
        ./client ./annotator ./worker ./service \
    && /usr/local/bin/python -m pip --python /opt/cwpo/bin/python install wheels/* ${STORE_DRIVERS} \
    && /usr/local/bin/python -m cyclonedx_py environment /opt/cwpo/bin/python \
        --output-reproducible --output-file /opt/cwpo/sbom.cdx.json


FROM build-torch AS build-trainer
RUN --mount=type=cache,target=/tmp/.cache/pip \
    /usr/local/bin/python -m pip --python /opt/cwpo/bin/python install \
        --no-deps --require-hashes --requirement locks/trainer.txt
COPY client client
COPY annotator annotator
COPY trainer trainer
RUN --mount=type=cache,target=/tmp/.cache/pip \
    /usr/local/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir wheels \
        ./client ./annotator ./trainer \
    && /usr/local/bin/python -m pip --python /opt/cwpo/bin/python install wheels/* \
    && /usr/local/bin/python -m cyclonedx_py environment /opt/cwpo/bin/python \
        --output-reproducible --output-file /opt/cwpo/sbom.cdx.json


FROM base AS worker
ARG VERSION=0.2.0
LABEL org.opencontainers.image.title="cwpo-worker" \
      org.opencontainers.image.description="Batch annotation jobs of CW-PO; no torch" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV CWPO_HEARTBEAT_FILE=/tmp/cwpo-worker-alive
COPY --from=build-worker /opt/cwpo /opt/cwpo
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=5s --start-period=1m --retries=3 \
    CMD ["python", "-c", "import os, sys, time; sys.exit(time.time() - os.stat(os.environ['CWPO_HEARTBEAT_FILE']).st_mtime > 180)"]
ENTRYPOINT ["cwpo", "worker"]


FROM base AS trainer
ARG VERSION=0.2.0
LABEL org.opencontainers.image.title="cwpo-trainer" \
      org.opencontainers.image.description="Trains CW-PO annotators and aligns models" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    MPLCONFIGDIR=/tmp/matplotlib
COPY --from=build-trainer /opt/cwpo /opt/cwpo
USER 10001:10001
WORKDIR /data
# A run ends with an exit status, and has no other sign of health.
HEALTHCHECK NONE
ENTRYPOINT ["cwpo"]


FROM base AS service
ARG VERSION=0.2.0
LABEL org.opencontainers.image.title="cwpo-service" \
      org.opencontainers.image.description="Serves a CW-PO annotator and accepts batch jobs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# A container is reached from outside only on 0.0.0.0, which the service refuses without API keys.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CWPO_HOST=0.0.0.0 \
    CWPO_PORT=8000
COPY --from=build-service /opt/cwpo /opt/cwpo
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; e = os.environ; port = e.get('CWPO_HEALTH_PORT') or e['CWPO_PORT']; u.urlopen(f'http://127.0.0.1:{port}/health/ready', timeout=4)"]
ENTRYPOINT ["cwpo", "serve"]
