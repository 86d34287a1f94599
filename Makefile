# Every target sets up what it needs: a fresh machine with Python 3.11, make and a C++ compiler is enough.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SANITIZED := build/sanitized
# several processes with one thread each: the tests are many and small
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

.PHONY: demo test test-all test-native-asan lint clean

demo: $(READY)
	$(BIN)/bitstep demo --out demo --overwrite

test: $(READY)
	$(PYTEST)

test-all: $(READY)
	$(PYTEST) -m "slow or not slow"

# The sanitizers' runtimes must come before Python's own libraries; what Python itself never frees is no leak of ours.
test-native-asan: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt cmake
	$(BIN)/cmake -S native -B $(SANITIZED) -DBITSTEP_SANITIZE=ON -DCMAKE_BUILD_TYPE=Debug
	$(BIN)/cmake --build $(SANITIZED)
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 BITSTEP_NATIVE_LIBRARY=$(SANITIZED)/bitstep_cpu.so \
		OMP_NUM_THREADS=2 $(BIN)/python -m pytest tests/test_native.py tests/test_native_fused.py tests/test_native_uniform.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Torch comes first and alone, so that nothing else chooses its version.
$(READY): pyproject.toml constraints.txt $(wildcard native/* native/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build demo .pytest_cache .mypy_cache .ruff_cache
