# Environments: .venv-demo is the runtime alone (no PyTorch), .venv is everything, and the others have their own pins.
# Each is updated only when its lists change. `make` alone lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?=
VENV := .venv
DEMO_VENV := .venv-demo
OPTIMUM_VENV := .venv-optimum
OBJECTS_VENV := .venv-objects
OPENCLIP_VENV := .venv-openclip
COMPAT_VENV := .venv-compat
DOCS_VENV := .venv-docs
RELEASE_VENV := .venv-release
WEB_PAGE := unidiff_sdk/cli/servers/site/page/index.html
MAKE_VENV = python=$$(.ci/find-python $(PYTHON)); [ -x $(@D)/bin/python ] || "$$python" -m venv $(@D)
PIP := -m pip install --quiet --disable-pip-version-check
LOCK := pyproject.toml constraints.txt
ARGS ?=

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

dev: $(VENV)/.ready ## install the development environment into .venv

demo: $(DEMO_VENV)/.ready ## index, search and generate without PyTorch; writes demo/index.html
	@$(DEMO_VENV)/bin/python examples/demo.py $(ARGS)

test: $(VENV)/.ready ## the quick test suite
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not browser" $(ARGS)

web: $(WEB_PAGE) ## build the page of `unidiff web`, which needs Node.js with npm

test-web: $(VENV)/.ready web/node_modules/.ready ## type check of the page, and its tests against Python
	PYTHONPATH=tests:tests/store $(VENV)/bin/python tests/web/write_cases.py web/test/cases
	cd web && npm run --silent check && npm run --silent test

test-browser: $(VENV)/.ready $(WEB_PAGE) ## the storefront and the page of `unidiff web` in Chromium, which must be installed
	$(VENV)/bin/python -m pytest tests/browser $(ARGS)

test-all: $(VENV)/.ready ## the whole test suite
	$(VENV)/bin/python -m pytest $(ARGS)

coverage: $(VENV)/.ready ## the quick test suite with branch coverage; writes coverage.xml
	$(VENV)/bin/python -m pytest -m "not slow and not browser" --cov --cov-report=term-missing:skip-covered --cov-report=xml $(ARGS)

test-matrix: $(VENV)/.ready ## families of models x precisions x targets, each against diffusers; an hour
	$(VENV)/bin/python -m pytest tests/export/test_matrix.py $(ARGS)

test-optimum: $(OPTIMUM_VENV)/.ready ## our bundles in optimum's pipelines, and its exports in our runtime
	$(OPTIMUM_VENV)/bin/python -m pytest tests/export/test_optimum.py $(ARGS)

test-objects: $(OBJECTS_VENV)/.ready ## images in object storage, over the S3 protocol on loopback
	$(OBJECTS_VENV)/bin/python -m pytest tests/store/test_image_backends.py tests/scale/test_object_sources.py $(ARGS)

test-openclip: $(OPENCLIP_VENV)/.ready ## converted OpenCLIP models against open_clip itself
	PYTHONPATH=. $(OPENCLIP_VENV)/bin/python tests/compat/check_open_clip.py

test-compat: $(COMPAT_VENV)/.ready ## our checkpoints in transformers 4.57 and diffusers 0.36
	$(COMPAT_VENV)/bin/python tests/compat/check_checkpoint.py unidiff_sdk/training/recipes/tiny_checkpoint

pipeline: $(VENV)/.ready ## fine-tune, evaluate, export, search, generate; writes pipeline/index.html
	@$(VENV)/bin/python examples/pipeline.py $(ARGS)

real: $(VENV)/.ready ## the same on Debian's tuxpaint stamps, real images; writes real/index.html
	@$(VENV)/bin/python examples/real_images.py $(ARGS)

tiny: $(VENV)/.ready ## train the tiny base from scratch and export the default bundle (two hours on two cores)
	$(VENV)/bin/python -m unidiff_sdk.training.recipes.tiny runs/tiny -o unidiff_sdk/training/recipes/tiny_checkpoint $(ARGS)
	$(VENV)/bin/unidiff-export tiny -o unidiff_sdk/models/tiny --overwrite

bench: $(VENV)/.ready ## every benchmark, with its peers; writes benchmarks/RESULTS.md
	$(VENV)/bin/python benchmarks/prepare.py
	$(VENV)/bin/python benchmarks/run_all.py $(ARGS)

ablation: $(VENV)/.ready ## the effect of each term of the joint objective (hours on two cores); writes benchmarks/QUALITY.md
	$(VENV)/bin/python benchmarks/ablation.py $(ARGS)
	$(VENV)/bin/python benchmarks/quality.py

bench-ci: $(VENV)/.ready ## short latency gates against PyTorch in the same run
	$(VENV)/bin/python benchmarks/ci.py $(ARGS)

soak: $(VENV)/.ready ## try to break everything, for about an hour; resumable; writes docs/results/soak.md
	$(VENV)/bin/python benchmarks/soak --record $(ARGS)

soak-short: $(VENV)/.ready ## the same with a few trials of each section, as in CI; a minute
	$(VENV)/bin/python benchmarks/soak --short --state $$(mktemp -d) $(ARGS)

lint: $(VENV)/.ready ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(DOCS_VENV)/.ready ## build the documentation into site/, offline; fails on dead links
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo "The documentation is site/index.html."

notebooks: $(VENV)/.ready ## run the notebooks of the documentation and save their outputs
	$(VENV)/bin/python docs/run_notebooks.py $(ARGS)

dist: $(RELEASE_VENV)/.ready $(WEB_PAGE) ## build the sdist and the wheel into dist/ and check their metadata
	rm -rf dist
	$(RELEASE_VENV)/bin/python -m build --no-isolation
	$(RELEASE_VENV)/bin/python -m twine check --strict dist/*

smoke-test: ## install the wheel in dist/ into a new environment and run the quickstart
	.ci/smoke-test $(PYTHON)

clean: ## remove environments, outputs and caches
	rm -rf $(VENV) $(DEMO_VENV) $(OPTIMUM_VENV) $(OBJECTS_VENV) $(OPENCLIP_VENV) $(COMPAT_VENV) $(DOCS_VENV) $(RELEASE_VENV)
	rm -rf web/node_modules unidiff_sdk/cli/servers/site/page
	rm -rf demo pipeline real site build dist .coverage coverage.xml .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(DEMO_VENV)/.ready: $(LOCK)
	@$(MAKE_VENV)
	@echo "Installing the runtime into $(@D) (once)…"
	@$(@D)/bin/python $(PIP) -c constraints.txt -e ".[cpu]"
	@touch $@

$(VENV)/.ready: $(LOCK)
	@$(MAKE_VENV)
	@$(@D)/bin/python .ci/torch_build.py constraints.txt
	@echo "Installing runtime, training, export and test tools into $(@D) (once)…"
	@$(@D)/bin/python $(PIP) -c constraints.txt -e ".[cpu,train,export,dev]"
	@touch $@

$(OPTIMUM_VENV)/.ready: pyproject.toml tests/requirements-optimum.txt
	@$(MAKE_VENV)
	@$(@D)/bin/python .ci/torch_build.py tests/requirements-optimum.txt
	@echo "Installing optimum and the runtime into $(@D) (once)…"
	@$(@D)/bin/python $(PIP) -r tests/requirements-optimum.txt -e ".[cpu]"
	@touch $@

$(OBJECTS_VENV)/.ready: pyproject.toml tests/requirements-objects.txt
	@$(MAKE_VENV)
	@echo "Installing s3fs, moto and the runtime into $(@D) (once)…"
	@$(@D)/bin/python $(PIP) -r tests/requirements-objects.txt -e ".[cpu]"
	@touch $@

# open_clip imports torchvision, which must be of the same build as torch. The default builds of both are for CUDA.
$(OPENCLIP_VENV)/.ready: tests/compat/requirements-openclip.txt
	@$(MAKE_VENV)
	@echo "Installing open_clip with a torch and torchvision that match into $(@D) (once, several GB)…"
	@$(@D)/bin/python $(PIP) -r $<
	@touch $@

$(COMPAT_VENV)/.ready: tests/compat/requirements.txt
	@$(MAKE_VENV)
	@$(@D)/bin/python .ci/torch_build.py $<
	@echo "Installing transformers 4.57 and diffusers 0.36 into $(@D) (once)…"
	@$(@D)/bin/python $(PIP) -r $<
	@touch $@

$(DOCS_VENV)/.ready: $(LOCK)
	@$(MAKE_VENV)
	@echo "Installing the documentation tools into $(@D) (once)…"
	@$(@D)/bin/python $(PIP) -c constraints.txt -e ".[docs]"
	@touch $@

$(RELEASE_VENV)/.ready: .ci/requirements-release.txt
	@$(MAKE_VENV)
	@echo "Installing build and twine into $(@D) (once)…"
	@$(@D)/bin/python $(PIP) -r $<
	@touch $@

web/node_modules/.ready: web/package.json web/package-lock.json
	cd web && npm ci --ignore-scripts --no-audit --no-fund --loglevel error
	@touch $@

$(WEB_PAGE): web/node_modules/.ready $(shell find web/src web/public) web/index.html web/vite.config.ts \
		unidiff_sdk/serve/static/style.css unidiff_sdk/serve/static/json.js
	cd web && npm run --silent build
	@touch $@

.PHONY: help dev demo test web test-web test-browser test-all coverage test-matrix test-optimum test-objects test-openclip test-compat pipeline real tiny bench ablation \
	bench-ci soak soak-short lint docs notebooks dist smoke-test clean
