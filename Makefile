# The README's commands. Everything runs from .venv, which `setup` makes.
.PHONY: help setup demo test lint lock clean
PY := .venv/bin/python

help:            ## these lines
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ —/'
setup:           ## Debian packages and .venv
	@deploy/setup.sh
demo:            ## the whole product on this machine, live (root)
	@deploy/setup.sh
	@.venv/bin/loopback demo --out build/demo
test:            ## lint, types, imports, then every test (root)
	@deploy/setup.sh test
	@$(MAKE) --no-print-directory lint
	@$(PY) -m pytest
lint:            ## ruff, mypy, import rules
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
lock:            ## renew requirements/*.txt from pyproject.toml
	@.venv/bin/uv pip compile -q --upgrade --generate-hashes --no-header --no-annotate --python-version 3.11 \
		--extra services --extra host --extra cli --extra dev pyproject.toml -o requirements/lock.txt
clean:           ## what builds leave behind
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
