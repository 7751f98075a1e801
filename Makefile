# Everything runs in .venv, which any target makes when it needs it. `make` alone lists the targets.

PYTHON ?= python3
OUT    := demo-out
RECORD := benchmarks/results/cpu.json
SUITES := losses host memory scaling
ARGS   ?=
MINUTES ?= 60
KILLS ?= 200
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

VENV   := .venv
INSIDE := $(VENV)/bin/python
LOCK   := requirements.lock

# The stamp names what was installed and where: a changed lock, checkout or build reinstalls.
KEY   := $(shell { cat $(LOCK) pyproject.toml setup.py; pwd; } | cksum | cut -d' ' -f1)
STAMP := $(VENV)/installed-$(KEY)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-all fuzz mutation soak lint bench bench-report wheel lock hub-kernel site notebooks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with the locked versions and this project

demo: $(STAMP) ## turn foxes into wolves in the emoji pipeline, without network or GPU; report in demo-out/ (OUT=, ARGS=)
	$(VENV)/bin/fdu demo --out "$(OUT)" $(ARGS)

# One thread per worker; threads that wait sleep. Bytecode is kept: rewriting the tests is a third of collecting them.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(INSIDE) -m pytest -n $(WORKERS)

test: $(STAMP) ## test every subject, at most 5 minutes on two cores (ARGS="-k name" WORKERS=2)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP) ## test every model, method, instruction set and GPU, in pairs of settings, about 20 minutes on two cores (ARGS= WORKERS=)
	$(PYTEST) $(ARGS)

fuzz: $(STAMP) ## feed the readers of files ever new malformed ones (MINUTES=60 WORKERS=)
	FDU_FUZZ_MINUTES=$(MINUTES) $(PYTEST) -o timeout=0 -o faulthandler_timeout=0 tests/fdu/test_fuzz.py $(ARGS)

mutation: $(STAMP) ## count the changes to the core files that their tests notice, some minutes (ARGS="FILE --sample 20")
	$(INSIDE) tests/mutation.py $(ARGS)

soak: $(STAMP) ## kill fdu at random points and start it again, an hour or two; every result must be the undisturbed one (KILLS=200 ARGS=)
	FDU_STEADY_CALLS=100000 $(INSIDE) -m pytest -o timeout=0 -k memory tests/fdu_kernels/test_steady.py
	PYTHONPATH=tests:tests/fdu $(INSIDE) tests/soak.py --kills $(KILLS) $(ARGS)

lint: $(STAMP) ## check style, formatting and types
	$(INSIDE) -m ruff check
	$(INSIDE) -m ruff format --check
	$(INSIDE) -m mypy

site: $(STAMP) ## build the documentation into site/; a broken link, or a page outside the navigation, is an error
	NO_MKDOCS_2_WARNING=1 $(INSIDE) -m mkdocs build --strict

notebooks: $(STAMP) ## run the notebooks of the documentation and store what they show
	$(INSIDE) docs/notebooks/execute.py

bench: $(STAMP) ## time this CPU, some ten minutes (leave it alone; SUITES="losses host memory scaling training evaluation closed_form")
	@for suite in $(SUITES); do \
	    echo "$$suite"; $(INSIDE) "benchmarks/bench_$$suite.py" --record "$(RECORD)" $(ARGS) || exit 1; \
	done
	$(INSIDE) benchmarks/promises.py "$(RECORD)"

bench-report: $(STAMP) ## write docs/performance.md from the records; nothing is measured
	$(INSIDE) benchmarks/report.py --record "$(RECORD)"

wheel: $(STAMP) ## build the wheel into dist/
	rm -rf build dist
	$(INSIDE) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist

hub-kernel: ## write fdu_kernels as a kernel of Hugging Face's library kernels into dist/hub-kernel/
	$(PYTHON) .ci/hub_kernel.py dist/hub-kernel
	@ls dist/hub-kernel/build

lock: SHELL := bash
lock: ## resolve requirements.lock from pyproject.toml (needs uv; ARGS=--upgrade for the newest versions)
	@command -v uv >/dev/null || { echo "make lock needs uv: pip install uv" >&2; exit 1; }
	@# dev leaves out the extras that are large: nudity (and under the AGPL), ray, studio.
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --prerelease disallow \
	    --constraint <(grep '^torch==' $(LOCK); echo 'mpmath<1.4 # as sympy asks') \
	    --no-annotate --no-header --quiet --output-file $(LOCK) $(ARGS)
	@# The CUDA libraries are those that the chosen build of torch brings with it.
	@sed -i -E -e '/^(nvidia|cuda)-/d' -e '1i # Runtime and development, Python 3.10 and newer. Made by make lock; to change torch, edit its line and run it.' $(LOCK)

clean: ## remove .venv and everything built
	rm -rf $(VENV) demo-out site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find fdu fdu_kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

define CHECK_PYTHON
@command -v $(PYTHON) >/dev/null || { echo \
    "There is no $(PYTHON). On Debian or Ubuntu: apt install python3 python3-venv" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo \
    "Python 3.10 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
    "Name another: make PYTHON=python3.11 (on Debian or Ubuntu: apt install python3.11 python3.11-venv)" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo \
    "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt install" \
    "$$($(PYTHON) -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')" >&2; exit 1; }
endef

# torch goes first and alone: with it in place nothing else can bring another build of it. The project itself is built
# without isolation for the same reason. .venv/installing marks an unfinished install, which starts from nothing.
$(STAMP):
	$(CHECK_PYTHON)
	@if [ -e $(VENV)/installing ]; then echo "The last install did not finish; starting again."; rm -rf $(VENV); fi
	mkdir -p $(VENV) && rm -f $(VENV)/installed-* && touch $(VENV)/installing
	[ -x $(INSIDE) ] || $(PYTHON) -m venv $(VENV)
	$(INSIDE) -m pip install --quiet "$$(grep '^torch==' $(LOCK))"
	$(INSIDE) -m pip install --quiet --requirement $(LOCK)
	$(INSIDE) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(INSIDE) -m pip check
	mv $(VENV)/installing $@
