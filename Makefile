# Each target makes an environment first when it is missing or older than pyproject.toml; uv does it where it is
# installed, else pip. VENV and PYTHON choose another environment and interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# A representative tenth of the suite: rows of each kind, and the rooms that a new version of a dependency breaks first.
SAMPLE := tests/test_conformance.py tests/test_lowering.py tests/test_structure.py tests/test_docs.py tests/test_detector.py \
  tests/synthesis tests/metrics tests/bijectors tests/parity tests/driver/test_fit.py tests/driver/test_embedding.py
ROWS := padim,patchcore,fastflow,stfpm,cutpaste,mahalanobis_ad

.PHONY: demo test test-all test-sample lint clean

demo: $(VENV)/.run
	$(BIN)/jaxad benchmark demo --methods patchcore --report runs/demo/report.html

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --slow $(if $(METHOD),--method $(METHOD))

test-sample: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --rows $(ROWS) $(SAMPLE)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(VENV)/.run: pyproject.toml
	@$(call install,.)
	@touch $@

$(VENV)/.dev: pyproject.toml
	@$(call install,.[test$(comma)lint])
	@touch $@ $(VENV)/.run

comma := ,
install = if command -v uv >/dev/null; then \
	  { test -x $(BIN)/python || uv venv -q --python $(PYTHON) $(VENV); } && uv pip install -q --python $(BIN)/python -e '$(1)'; \
	else \
	  { test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); } && $(BIN)/python -m pip install -q -e '$(1)'; \
	fi

clean:
	rm -rf .venv* .jax_cache .pytest_cache .ruff_cache .hypothesis dist
