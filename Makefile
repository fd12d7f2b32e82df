# Two commands do all the set-up: `make demo` and `make test`. Both can be repeated.
# While writing, `make quick`: units, the rules of the repository and one test of each other kind.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Three keep two cores busy, as many tests wait.
WORKERS ?= 3
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder
QUICK := tests/unit tests/remote/test_engine_client.py tests/remote/test_wire.py tests/repo \
	tests/kernels/test_paged_attention.py::test_rows_of_equal_length \
	'tests/models/test_families.py::test_logits_equal_transformers[llama-gqa]' \
	'tests/engine/test_families.py::test_greedy_tokens_are_those_of_transformers[llama]' \
	'tests/engine/test_families.py::test_compiled_blocks_give_the_same_tokens[gpt_neox]' \
	tests/server/test_http.py::test_every_answer_has_its_requests_id \
	tests/benchmarks/test_commands.py::test_random_weights_need_only_a_config

.PHONY: demo test quick sanitize lint format clean

demo: $(READY)
	$(BIN)/compiledllm generate --chat --temperature 0 --max-tokens 160 \
		"Explain in a few sentences why the sky is blue."

test: $(READY)
	HYPOTHESIS_PROFILE=ci $(PYTEST)

quick: $(READY)
	$(PYTEST) $(QUICK) --deselect tests/repo/test_readme.py::test_command_runs \
		--deselect tests/repo/test_readme.py::test_python_example_runs

# On a machine with a GPU and CUDA's toolkit; minutes.
sanitize: $(READY)
	$(BIN)/python -m tests.kernels.sanitize

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/mypy-root/compiledllm
	@ln -sfn $(CURDIR)/compiledllm/* $(CURDIR)/graphs $(CURDIR)/kernels $(CURDIR)/models \
		$(CURDIR)/benchmarks $(VENV)/mypy-root/compiledllm/
	cd $(VENV)/mypy-root && ../bin/mypy --config-file ../../pyproject.toml -p compiledllm

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The environment is made again when what goes into it changes.
$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
		sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch and triton are large; later runs skip this)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
		--constraint .ci/constraints.txt --editable '.[server,bench,gguf,dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # as pip would, but on all cores
	@touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
