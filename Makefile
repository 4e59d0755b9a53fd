# vfu-server: from a fresh Debian machine to a running demo. `make` alone explains.
#
#   PYTHON=...           the interpreter to use (3.11 or newer); the first suitable one otherwise
#   ARGS=...             further arguments for pytest, the demo or the benchmarks
#   VFU_CACHE=...        where environments, sources and test roots are kept (default: ~/.cache/vfu-server)
#   LIBVFIO_USER_SRC=... a folder with libvfio-user's source, instead of fetching it from Debian

PY := .venv/bin/python
METADATA := vfu_server.egg-info/entry_points.txt
QUICK := not slow and not vm or package

export PYTHON
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

.PHONY: help
help: ## this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: setup ## a live migration between two servers with a software device, no hardware needed
	@$(PY) -m vfu_server.demo $(ARGS)

.PHONY: test
test: setup ## everything but virtual machines and what takes minutes: models, protocol, QEMU, the wheel
	@tools/system-packages test
	@$(PY) -m pytest -m "$(QUICK)" $(ARGS)

.PHONY: test-vm
test-vm: setup ## virtual machines: kernel VFIO by group and by device node, guests inside (ARGS='-k edu')
	@tools/system-packages vm
	@$(PY) tools/vm/kernel.py  # compiled once: minutes
	@$(PY) -m pytest -m "vm and not qemu" $(ARGS) tests/vm

.PHONY: test-qemu
test-qemu: setup ## live migration by the QEMU of `make qemu`, beside each other and in virtual machines (ARGS='-k edu')
	@tools/system-packages vm
	@tools/system-packages qemu
	@$(PY) tools/vm/kernel.py  # compiled once: minutes
	@$(PY) tools/qemu_build.py  # the same
	@$(PY) -m pytest -m qemu $(ARGS) tests/qemu_migration tests/vm

.PHONY: test-all
test-all: setup ## all of it: slow tests and virtual machines as well
	@tools/system-packages vm
	@$(PY) tools/vm/kernel.py || true  # minutes, once; the lane itself says what it cannot do
	@tools/system-packages qemu && $(PY) tools/qemu_build.py || true  # the same
	@$(PY) -m pytest $(ARGS)

.PHONY: qemu
qemu: setup ## a QEMU that migrates our devices (contrib/qemu), compiled from Debian's source; minutes, once
	@tools/system-packages qemu
	@$(PY) tools/qemu_build.py

.PHONY: lint
lint: setup ## ruff and mypy
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy

.PHONY: bench
bench: setup ## the benchmarks
	@$(PY) -m benchmarks $(ARGS)

.PHONY: wheel
wheel: setup ## an installable wheel in dist/
	@$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -1 dist/*.whl

.PHONY: clean
clean: ## remove what was built in this folder; the cache stays
	@rm -rf build dist *.egg-info .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@rm -f vfu_server/libvfio_user/_native*.so vfu_server/libvfio_user/_native.stamp
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up: each step is done at once when there is nothing to do ---------------------------------------------------

.PHONY: setup
setup: native $(METADATA) ## system packages, virtual environment, native extension

.PHONY: system
system:
	@tools/system-packages build

.PHONY: venv
venv: system
	@$$(tools/find-python) tools/venv.py

.PHONY: native
native: venv
	@$(PY) -m vfu_server.libvfio_user.build

# Entry points of a checkout: importlib.metadata finds them beside the packages.
$(METADATA): pyproject.toml setup.py vfu_server/__init__.py | native
	@$(PY) -W ignore setup.py -q egg_info
