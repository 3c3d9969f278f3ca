# make demo: install, merge a really trained pair of models and measure the result.
# make test: install with the test tools, check style and types, run every test.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip

.PHONY: demo test lint style types clean

demo: $(VENV)/installed
	$(BIN)/ggez-merge recipes/emoji/sea.yaml --out demo/emoji-sea-0.3 --overwrite
	$(BIN)/python -m ggez_merge.recipes.emoji.evaluate recipes/emoji/global demo/emoji-sea-0.3 recipes/emoji/region

# Three processes, for Triton is either interpreted or compiled for the whole life of one.
test: lint
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m pytest tests/gpu_codegen

lint: style types

style: $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# mypy knows folders, not package_dir, so it gets a tree of links that has the packages' names.
types: $(VENV)/installed-test
	rm -rf build/types
	mkdir -p build/types/ggez_merge
	ln -s $(CURDIR)/kernels build/types/ggez_kernels
	ln -s $(CURDIR)/merge/* $(CURDIR)/benchmarks $(CURDIR)/recipes build/types/ggez_merge/
	MYPYPATH=build/types $(BIN)/mypy -p ggez_merge -p ggez_kernels

# The two stamps keep a second call from installing again while requirements and pins are unchanged.
$(VENV)/installed: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
