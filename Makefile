# The README's commands. Everything runs from .venv, which `setup` makes.
.PHONY: help setup demo test test-stolen-activation test-compose test-differential test-kernels fuzz fuzz-frames bench bench-datapath lint lock clean
PY := .venv/bin/python

help:            ## these lines
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ —/'
setup:           ## Debian packages and .venv
	@deploy/setup.sh
demo:            ## the whole product on this machine, live (root)
	@deploy/setup.sh
	@.venv/bin/loopback demo --out build/demo
test:            ## lint, types, imports, then every test (root)
	@deploy/setup.sh test
	@$(MAKE) --no-print-directory lint
	@$(PY) -m pytest -n 2
test-stolen-activation:  ## what whoever has activation's key cannot do, and no more than `rollout plan` says
	@deploy/setup.sh test
	@$(PY) -m pytest tests/attacks/test_stolen_activation*.py tests/attacks/test_stolen_gates.py tests/attacks/test_wiped_host.py
test-compose:    ## builds the image, brings compose.yaml up with docker-compose, lets a host join (root, docker-compose, a package index)
	@deploy/setup.sh test
	@LOOPBACK_COMPOSE=1 $(PY) -m pytest tests/integration/test_deploy_compose.py tests/integration/test_deploy_compose_up.py
fuzz:            ## a million inputs for every parser of outside bytes, then some guided by coverage (hours)
	@deploy/setup.sh
	@$(PY) -m tests.fuzz --executions 1000000 --jobs 2
	@$(PY) -m tests.fuzz --executions 100000 --jobs 2 --engine guided
test-differential: ## 100,000 packets for each rule set, judged by a plain evaluator, the real program and nftables (root; ten minutes)
	@deploy/setup.sh test
	@LOOPBACK_FULL=1 $(PY) -m pytest tests/kernel/test_rulesets_differential.py tests/kernel/test_policy_differential.py
test-kernels:    ## the programs under the kernels in /boot, in qemu: Debian 12's own with linux-image-amd64 (root, qemu-system-x86)
	@deploy/setup.sh
	@apt-get install -y -qq --no-install-recommends qemu-system-x86 busybox-static cpio kmod linux-image-amd64 >/dev/null
	@$(PY) -m tests.kernels
fuzz-frames:     ## ten million malformed frames through every program, each read by a plain parser, too (root; minutes)
	@deploy/setup.sh test
	@$(PY) -m tests.fuzz.frames --executions 10000000 --jobs 2
bench:           ## what trust costs, as build/bench/trust.json
	@deploy/setup.sh
	@$(PY) bench/trust.py
bench-datapath:  ## every figure of the firewall's datapath beside its peers: build/bench/datapath.json and .png (root; ONLY="KEY …")
	@deploy/setup.sh test
	@$(PY) bench/datapath.py $(if $(ONLY),--only $(ONLY)) $(if $(ROUNDS),--rounds $(ROUNDS))
lint:            ## ruff, mypy, import rules
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
lock:            ## renew requirements/*.txt from pyproject.toml
	@.venv/bin/uv pip compile -q --upgrade --generate-hashes --no-header --no-annotate --python-version 3.11 \
		--extra services --extra host --extra cli --extra dev pyproject.toml -o requirements/lock.txt
	@.venv/bin/uv pip compile -q --generate-hashes --no-header --no-annotate --python-version 3.11 \
		--extra services --extra cli -c requirements/lock.txt pyproject.toml -o requirements/services.txt
clean:           ## what builds leave behind
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
