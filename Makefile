# Each recipe is a command you can also type. On Windows the environment's programs are in .venv/Scripts.
# What is typed after `make` counts, and not what a shell has exported: there these names are other programs'.
PYTHON := python3
OPTIONS :=
ARGS :=
TESTS :=
UPGRADE :=

IN_PLACE := {{cookiecutter.service_name}}
SERVICE := $(IN_PLACE)
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# uv where there is one, because it is quicker; pip does the same.
INSTALL := $(if $(shell command -v uv),uv pip install --python .venv,$(BIN)/python -m pip install) --require-hashes
LOCK := $(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-emit-index-url --no-annotate $(UPGRADE)
# What torch brings along and is imported without.
GPU := cuda-bindings cuda-pathfinder nvidia-cuda-cccl nvidia-nvtx triton
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile

.PHONY: help demo test prove homes test-models corpus gameday test-gameday test-image example check fix files bake benchmark lock setup

help: ## show these lines
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' Makefile

demo: .venv/render.stamp ## render with defaults into build/, run the service, send predictions
	$(BIN)/python -m scripts.demo

test: .venv/dev.stamp ## render every option, then check, test and run what was rendered
	$(PYTEST) -m "not image and not models and not gameday" $(ARGS)

prove: ## test the machinery of a service in full: make prove SERVICE=path (ARGS='-m "not faults"' spares minutes)
	$(MAKE) --directory "$(SERVICE)" setup
	PROVE_SERVICE="$(abspath $(SERVICE))" "$(SERVICE)/$(BIN)/python" -m pytest --numprocesses 2 --dist worksteal $(or $(TESTS),tests/service) $(ARGS)

homes: .venv/dev.stamp ## render into build/homes/ what else to prove: imported models, all capabilities
	$(BIN)/python -m scripts.homes

test-models: .venv/dev.stamp ## import models of many kinds into rendered services and serve them: minutes
	$(PYTEST) --dist loadgroup -m models $(ARGS)

corpus: .venv/dev.stamp ## import all models of tests/corpus into a render and compare: half an hour; ARGS=--document
	$(BIN)/python -m scripts.render build/corpus service_name=corpus
	$(MAKE) --directory build/corpus/corpus setup
	cd build/corpus/corpus && $(INSTALL) --requirement ../../../requirements/models.txt
	$(BIN)/python -m tests.corpus.run build/corpus/corpus --jobs 2 $(ARGS)

gameday: ## break a service on purpose, every alert has to fire and to resolve; ten minutes: make gameday SERVICE=path
	$(MAKE) --directory "$(SERVICE)" setup
	PROVE_SERVICE="$(abspath $(SERVICE))" "$(SERVICE)/$(BIN)/python" -m tests.service.gameday.day $(ARGS)

test-gameday: .venv/dev.stamp ## the game day of a default render
	$(PYTEST) -m gameday $(ARGS)

test-image: .venv/dev.stamp ## build and run the service's container image; needs an engine
	$(PYTEST) -m image $(ARGS)

example: ## make the versions in the service's artifacts/ again: the iris model and its stub (ARGS=--check compares)
	$(MAKE) --directory "$(IN_PLACE)" setup
	PROVE_SERVICE="$(abspath $(SERVICE))" "$(IN_PLACE)/$(BIN)/python" -m tests.service.example $(ARGS)

check: .venv/dev.stamp ## look, never write: format, lint, types of the template
	$(BIN)/ruff format --check . "$(IN_PLACE)"
	$(BIN)/ruff check . "$(IN_PLACE)"
	$(BIN)/mypy
	$(MAKE) --directory "$(IN_PLACE)" setup
	cd "$(IN_PLACE)" && MYPYPATH=..:. $(BIN)/mypy --exclude service/capabilities/ ../tests/service

fix: .venv/dev.stamp ## format, and repair what the linter can
	$(BIN)/ruff format . "$(IN_PLACE)"
	$(BIN)/ruff check --fix . "$(IN_PLACE)"

files: .venv/dev.stamp ## write tests/files/ anew after files were added or removed
	$(BIN)/python -m pytest --refresh-files tests/test_files.py

bake: .venv/render.stamp ## render into build/: make bake OPTIONS="slo=strict ci=none"
	$(BIN)/python -m scripts.render build $(OPTIONS)

benchmark: .venv/render.stamp ## measure the service against reference servers: make benchmark ARGS="--model tiny"
	$(BIN)/python -m benchmarks.run $(ARGS)

lock: .venv/dev.stamp ## requirements/*.in to hashed *.txt; newer releases with UPGRADE=--upgrade
	$(LOCK) --constraints "$(IN_PLACE)/requirements/dev.txt" --output-file requirements/dev.txt requirements/dev.in
	$(LOCK) --constraints requirements/dev.txt --output-file requirements/render.txt requirements/render.in
	$(LOCK) --constraints "$(IN_PLACE)/requirements/dev.txt" --output-file requirements/models.txt requirements/models.in
	$(LOCK) --constraints "$(IN_PLACE)/requirements/dev.txt" $(addprefix --no-emit-package ,$(GPU)) --output-file requirements/torch.txt requirements/torch.in
	for file in "$(IN_PLACE)"/_overlays/capabilities/*/requirements/*.in; do $(LOCK) --constraints "$(IN_PLACE)/requirements/dev.txt" --output-file "$${file%.in}.txt" "$$file" || exit 1; done

setup: .venv/dev.stamp ## the template's environment, in .venv

# Rendering needs a third of what the tests do, so `make demo` does not wait for the rest.
.venv/render.stamp: requirements/render.txt | .venv/made.stamp
	$(INSTALL) --requirement requirements/render.txt
	@touch $@

.venv/dev.stamp: requirements/dev.txt | .venv/made.stamp
	$(INSTALL) --requirement requirements/dev.txt
	@touch $@ .venv/render.stamp

# Not pyvenv.cfg: that is there also where making the environment stopped half-way.
.venv/made.stamp:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, for example: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	@touch $@
