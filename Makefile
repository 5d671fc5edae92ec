# Two commands: `make demo` installs and runs the main job on text that is already there; `make test` runs all checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test sanitize emulate install install-test lint clean virtualenv

demo: install
	$(BIN)/hanmo build --out runs/demo --budget 225s --overwrite
	@echo
	$(BIN)/hanmo generate runs/demo "def read_file(path):" --max-new-tokens 60 --temperature 0.5 --seed 1

test: install-test lint
	$(BIN)/pytest -n 2

# the native engine's C++ under AddressSanitizer and UndefinedBehaviorSanitizer; and built for ARM, run by qemu
sanitize:
	tests/native/sanitize.sh

emulate:
	tests/native/emulate.sh

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/installed

install-test: $(VENV)/installed-test

# constraints.txt pins the versions this project is tested with; torch comes first, so that nothing pulls another build
define install_with
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || $(MAKE) virtualenv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(1)]'
endef

$(VENV)/installed: pyproject.toml constraints.txt
	$(call install_with,all)
	touch $@

# with the peers of the tests; at once, so that the native code is compiled once
$(VENV)/installed-test: pyproject.toml constraints.txt
	$(call install_with,test)
	touch $(VENV)/installed $@

# for a Python without ensurepip (Debian splits it off): virtualenv from a folder of its own, so that no system is touched
virtualenv:
	$(PYTHON) -m pip install --quiet --target $(VENV)-tools virtualenv
	PYTHONPATH=$(VENV)-tools $(PYTHON) -m virtualenv --quiet $(VENV)
	rm -rf $(VENV)-tools

clean:
	rm -rf $(VENV) build dist src/*.egg-info
