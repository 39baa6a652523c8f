# Requires Python 3.11 to 3.13 with venv, and make. Each target installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process per core. The tests of a file run in one process, because they share fixtures that are slow to create.
PARALLEL := --numprocesses=auto --dist=loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check format lock audit coverage clean

demo: $(VENV)/.installed  ## generate synthetic images, train on them, export the model: under 5 minutes on 2 cores
	$(BIN)/python -m trainer.task --flagfile=deploy/flags/demo.flags

test: $(VENV)/.installed-dev  ## all tests
	$(BIN)/python -m pytest $(PARALLEL)

check: $(VENV)/.installed-dev  ## format, lint, types, fast tests: under 2 minutes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

coverage: $(VENV)/.installed-dev  ## all tests, and the lines that they do not run, except those of killed processes
	$(BIN)/coverage erase
	-$(BIN)/coverage run -m pytest $(PARALLEL)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

format: $(VENV)/.installed-dev  ## format, and apply the fixes of the linter
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(VENV)/.installed-dev  ## pin the packages of the image with hashes; run it after changes of setup.py or constraints.txt
	for variant in cpu gpu; do $(BIN)/uv pip compile --quiet --upgrade --universal --python-version=3.11 --generate-hashes \
	  --no-annotate --custom-compile-command="make lock" --default-index=https://pypi.org/simple \
	  --constraint=constraints.txt --extra=$$variant --output-file=deploy/image/$$variant.txt setup.py || exit 1; done

audit: $(VENV)/.installed-dev  ## known vulnerabilities of the image; needs pypi.org, or ADVISORIES=FILE (see scripts/audit)
	$(BIN)/python scripts/audit $(ADVISORIES)

clean:  ## delete the environment, caches and the demo's output
	rm -rf $(VENV) demo_job build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*
	find trainer tests -name __pycache__ -exec rm -rf {} +

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[cpu]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --constraint constraints.txt --editable '.[cpu,dev]'
	$(BIN)/python tests/support/get_kubectl.py $(BIN)/kubectl
	touch $@
