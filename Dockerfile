# syntax=docker/dockerfile:1
# One image for head and workers, so that Ray and Python match everywhere. No weights inside: they lie on the model cache.
ARG BASE=python:3.11-slim-bookworm@sha256:0000000000000000000000000000000000000000000000000000000000000000
# Zeros stand for the digest of the image you mirror: a build that was not given one ends at IMAGE, saying so.
ARG GIVEN=${BASE%%*@sha256:00000000*}
ARG IMAGE="${GIVEN:?the digest of zeros is a placeholder, build with --build-arg BASE=python:3.11-slim-bookworm@sha256:<digest>}"
FROM ${IMAGE} AS build
WORKDIR /opt/sdgraph
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[otlp]'

FROM ${IMAGE} AS runtime
# KubeRay's probes and start commands run bash and wget inside the container.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --no-install-recommends -y bash wget gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home sdgraph
COPY --from=build /opt/venv /opt/venv
COPY config /opt/sdgraph/config
COPY pipelines /opt/sdgraph/pipelines
COPY deployments /opt/sdgraph/deployments
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/sdgraph \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.app:proxy_middlewares
WORKDIR /opt/sdgraph
USER 1000

# The embedded models inside, for k8s/overlays/dev-cpu: docker build --target dev
FROM runtime AS dev
COPY models /opt/sdgraph/models

FROM runtime
