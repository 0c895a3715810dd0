# Set-up, tests, lint and the demo, on Linux and macOS. Everything is installed into $(VENV); a second run starts at once.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
TORCH := $(shell grep '^torch==' constraints.txt)
# On Linux the default torch of pip brings about 3 GB of CUDA libraries. TORCH_INDEX=ADDRESS names an index with builds for CPUs, which
# pytorch.org lists under "Get started".
TORCH_INDEX ?=
PYTHONS := python3 python3.14 python3.13 python3.12 python3.11

# Kernels for the CPU (plugins/native/cpu), compiled on this machine. Optional: without them bundles use ONNX Runtime's.
LIBRARY := plugins/native/libqwen_export_cpu.so
SOURCES := $(wildcard plugins/native/*.h plugins/native/cpu/*.* $(addprefix plugins/native/cpu/kernels/,*.* tiles/*))

# The kernels are compiled while pip downloads.
MAKEFLAGS += --jobs=2

# Workers begin at the two ends of the files: what the tests of a file have in common is made once, for nearly all of them.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: help demo test test-all test-fast test-builtin test-documents native lint docs clean

help:
	@echo "make demo    build a bundle from the demo checkpoint, verify it and run it"
	@echo "make test    run the tests, but for those with the marker slow"
	@echo "make test-all      run those, too, as the workflow tests does every night"
	@echo "make test-fast     run some of every package, in about a minute"
	@echo "make test-builtin  run the tests of the runtime without this project's CPU kernels"
	@echo "make test-documents  run the commands that the documents show"
	@echo "make docs    make the site of the documents, in build/site"
	@echo "make native  compile the kernels for this machine's CPU (demo and test do it)"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove build/ and $(VENV)"

demo: $(STAMP) native
	$(BIN)/python examples/demo.py

test: $(STAMP) native
	$(PYTEST) $(ARGS)

test-all: test
	$(PYTEST) -m slow $(ARGS)

test-fast: $(STAMP) native
	$(PYTEST) --fast $(ARGS)

# A machine without a C++ compiler: everything runs on ONNX Runtime's own kernels.
RUNTIME_TESTS := $(addprefix tests/test_,runtime.py speculation.py sequences.py interruptions.py parity.py)

test-builtin: $(STAMP)
	QWEN_EXPORT_CPU_PLUGIN= $(PYTEST) $(RUNTIME_TESTS) $(ARGS)

# Each page's commands, from its first to its last.
test-documents: $(STAMP) native
	$(PYTEST) -m documents tests/documents $(ARGS)

docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

native: $(LIBRARY)

# Its own messages go to the terminal as they come, errors of the compiler to the log.
$(LIBRARY): $(SOURCES)
	@mkdir -p build; plugins/native/cpu/build.sh 2>build/native.log || { rm -f $@; \
	    echo "note: the CPU kernels could not be compiled ($$(grep -m1 error build/native.log || tail -n 1 build/native.log)): bundles will use ONNX Runtime's."; \
	    echo "      build/native.log has the compiler's messages."; }

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first, alone and at the pinned version: a resolver that may choose takes the newest one, with CUDA.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { \
	    for python in $(PYTHONS); do \
	        if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	            echo "$$python -m venv $(VENV)"; $$python -m venv $(VENV) && exit 0; \
	            echo "error: $$python cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)."; exit 1; \
	        fi; \
	    done; \
	    echo "error: no Python 3.11 or newer found as any of: $(PYTHONS)."; exit 1; }
	@echo "step 1 of 2: installing $(TORCH): 200 MB for CPUs, about 3 GB where only the build for CUDA is found; 1 to 10 minutes"
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	@echo "step 2 of 2: installing qwen-export and what its tests need: about 1 GB; 2 to 5 minutes"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf build $(VENV) $(LIBRARY)
