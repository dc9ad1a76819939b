# Each target makes .venv first when it is missing or older than pyproject.toml; uv does it where it is installed, else pip.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/.run
	$(BIN)/jaxad benchmark demo --methods patchcore --report runs/demo/report.html

test: .venv/.dev
	$(BIN)/python -m pytest -n auto

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/.run: pyproject.toml
	@$(call install,.)
	@touch $@

.venv/.dev: pyproject.toml
	@$(call install,.[test$(comma)lint])
	@touch $@ .venv/.run

comma := ,
install = if command -v uv >/dev/null; then \
	  { test -x $(BIN)/python || uv venv -q --python $(PYTHON) .venv; } && uv pip install -q --python $(BIN)/python -e '$(1)'; \
	else \
	  { test -x $(BIN)/python || $(PYTHON) -m venv .venv; } && $(BIN)/python -m pip install -q -e '$(1)'; \
	fi

clean:
	rm -rf .venv .jax_cache .pytest_cache .ruff_cache .hypothesis dist
