# make demo   set up from nothing, run the six scripts on the embedded default, print the table
# make test   set up from nothing, run the tests
#
# PYTHON=python3.12 picks another interpreter (3.11 or newer); PIP_FLAGS reaches pip, for example to
# take the CPU build of torch from its own index.
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint readme browser clean-demo
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(PY) -m liteguard.demo

test: $(VENV)/.installed-dev browser
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(PY) -m mypy
	$(PY) -m pytest tests --numprocesses 2 --dist loadfile

# report.html is tested in a browser. Installing one takes root and apt (a container has both);
# without it those tests are skipped, and this says so.
browser:
	@for name in chromium chromium-browser google-chrome; do \
	  command -v $$name >/dev/null && exit 0; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing Chromium for the tests of report.html"; \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends \
	    chromium fonts-liberation >/dev/null && exit 0; \
	fi; \
	echo "No Chromium: the tests that look at report.html in a browser will be skipped"

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Keep the report of make demo and render the README's numbers from benchmarks/*_report.json.
readme: $(VENV)/.installed
	$(PY) benchmarks/readme.py

clean-demo:
	rm -rf demo

# A deleted nightly makes the exact constraints unsatisfiable: then the pins alone decide.
define install
	@echo "Installing $(1): about 135 packages, 1.0 GB to download with the CPU build of torch"
	@echo "(the largest: tf-nightly 645 MB, torch 190 MB, litert-converter 70 MB);"
	@echo "about 5.0 GB on disk. A CUDA build of torch adds several GB."
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r $(1) -c constraints.txt \
	|| $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r $(1)
endef

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

SETS := requirements.txt requirements-train.txt requirements-bundle.txt requirements-convert.txt

$(VENV)/.installed: $(SETS) constraints.txt | $(PY)
	$(call install,requirements.txt)
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(SETS) constraints.txt | $(PY)
	$(call install,requirements-dev.txt)
	@touch $(VENV)/.installed $@
