# syntax=docker/dockerfile:1
# One image for head and workers, so that Ray and Python match everywhere. No weights inside: they lie on the model cache.
# No compiler either: `--target compiler` has one, for compiling UNets (k8s/components/tvm-compile-job) and for torch.compile.
# An image you mirror, by its digest: --build-arg BASE=python:3.11-slim-bookworm@sha256:<digest>. There is no default, and
# without it the build ends with `base name (${BASE}) should not be blank`.
ARG BASE
FROM ${BASE} AS runtime
# KubeRay's probes and start commands run bash and wget inside the container, in a login shell where its operator is told
# so: Debian's would look for `ray` in the system's folders alone.
# hadolint ignore=DL3008,SC2016
RUN apt-get update \
 && apt-get install --no-install-recommends -y bash wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home sdgraph \
 && echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/sdgraph.sh
WORKDIR /opt/sdgraph
# Exact versions with the hashes of their files: `make lock` writes it, with all that is needed and nothing else, so that
# pip need not look for more (spandrel asks for torchvision, which is not used). Nothing is compiled.
COPY requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv \
 && /opt/venv/bin/pip install --require-hashes --no-deps --requirement requirements.txt
COPY config /opt/sdgraph/config
COPY pipelines /opt/sdgraph/pipelines
COPY deployments /opt/sdgraph/deployments
# Nothing is written here at run time: without this every process would compile the modules anew.
RUN /opt/venv/bin/python -m compileall -q /opt/sdgraph
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/sdgraph \
    PYTHONUNBUFFERED=1 \
    HF_HUB_DISABLE_PROGRESS_BARS=1 \
    TQDM_DISABLE=1 \
    SDGRAPH_TVM_CACHE=/tmp/tvm \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.app:proxy_middlewares
USER 1000

FROM runtime AS compiler
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --no-install-recommends -y gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
USER 1000

# The embedded models inside, for k8s/overlays/dev-cpu: docker build --target dev
FROM runtime AS dev
COPY models /opt/sdgraph/models

FROM runtime
