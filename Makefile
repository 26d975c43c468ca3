# Everything runs in .venv, which the first target that needs it builds: Debian's Python refuses a bare pip, and nothing
# here should touch the system's packages.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/.peers

# meson-python finds meson and ninja on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help bench bench-peers compare figures accuracy exponential test test-gpu kernels test-large test-oldest fuzz \
	sanitize races leaks mutants coverage reproduce lint asv wheel clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

bench: $(READY) ## Time fastsoftmax against its peers: build/bench.json, build/bench.svg
	$(BIN)/python -m fastsoftmax bench --json build/bench.json --plot build/bench.svg

bench-peers: $(PEERS) ## The same with torch, onnxruntime and jax installed
	$(MAKE) bench

compare: $(PEERS) ## Hold fastsoftmax against its targets, at 1 and 2 threads: build/compare.json
	$(BIN)/python benchmarks/compare.py --json build/compare.json $(COMPARE_FLAGS)

figures: $(PEERS) ## Measure and draw the figures of docs/performance.md: build/figures.json
	$(BIN)/python benchmarks/figures.py --json build/figures.json

accuracy: $(PEERS) ## Hold results of every backend, tier and peer against exact ones: docs/accuracy.md and its figure
	$(BIN)/python benchmarks/accuracy.py --json build/accuracy.json $(ACCURACY_FLAGS)

exponential: $(READY) ## Hold the exponentials of all float32 and of many float64 against exact ones: docs/accuracy.md
	$(BIN)/python benchmarks/exponential.py --json build/exponential.json

# Whole files go to processes, as some of their fixtures compile for minutes; in the order of their names, which ends
# with short ones.
test: lint ## Lint, then run every test and doctest; a warning is an error
	find fastsoftmax -name '*.nb[ci]' -delete  # Numba's cache does not notice edits in other files
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# With the Python of a machine that has a card, numba-cuda and pytest, and perhaps no package registry: from the source
# tree, where the extension need not be built. SANITIZER= leaves compute-sanitizer out.
SANITIZER ?= compute-sanitizer
SANITIZED := "test_rows_within_a_warp and float32 or test_rows_of_a_block or not_fit or test_strips and float16 or split"

test-gpu: ## Run the tests of the CUDA backend on a card, then some under compute-sanitizer
	PYTHONPATH=. $(PYTHON) -m pytest tests/cuda -q
	@if test -n "$(SANITIZER)" && ! command -v $(SANITIZER) >/dev/null; then \
		echo "not run: memcheck, racecheck and synccheck, as there is no $(SANITIZER)"; \
	elif test -n "$(SANITIZER)"; then for tool in memcheck racecheck synccheck; do \
		PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 9 \
			$(PYTHON) -m pytest tests/cuda -q -k $(SANITIZED) || exit 1; done; fi

kernels: $(READY) ## Compile every CUDA kernel for three architectures, of which `make test` compiles a quarter
	FASTSOFTMAX_EVERY_KERNEL=1 $(BIN)/python -m pytest -q tests/test_cuda.py

test-large: $(READY) ## Test arrays of more than 2**31 elements, which takes minutes and 12 GiB of memory
	$(BIN)/python -m pytest -q tests/large.py

FUZZ_SECONDS ?= 600

fuzz: $(READY) ## Call the functions with arguments of any kind for FUZZ_SECONDS; FUZZ_FLAGS=--atheris follows coverage
	$(if $(findstring atheris,$(FUZZ_FLAGS)),$(BIN)/python -m pip install --quiet atheris)
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_FLAGS)

# A sanitized build of its own, in the directory of which Python finds it before the editable one. The sanitizer has to be
# loaded before Python, whose own leaks at exit are no news. Processes that tests start find `tests` by PYTHONPATH, behind
# that directory.
SANITIZED_TESTS ?= fuzz schedule threads 16_bits layouts selection sampling streaming variants cross_entropy
RACES_TESTS ?= threads concurrency schedule
library = $$($(CC) -print-file-name=lib$(1).so)
define sanitized
	test -d build/$(1) || CYTHON=$(CURDIR)/$(BIN)/cython $(BIN)/meson setup build/$(1) --prefix=/ \
		--python.purelibdir=site --python.platlibdir=site -Db_lundef=false -Doptimization=1 -Ddebug=true $(2)
	$(BIN)/meson install -C build/$(1) --quiet --destdir root
	cd build/$(1)/root/site && MESONPY_EDITABLE_SKIP="$$(echo $(CURDIR)/build/cp*)" PYTHONPATH="$(CURDIR)" \
		LD_PRELOAD="$(3)" $(4) \
		$(CURDIR)/$(BIN)/python -m pytest -q -k "cython or test_threads" $(5:%=$(CURDIR)/tests/test_%.py)
endef

sanitize: export ASAN_OPTIONS := detect_leaks=0,allocator_may_return_null=1
sanitize: export UBSAN_OPTIONS := halt_on_error=1,print_stacktrace=1
sanitize: $(READY) ## Run tests of the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(call sanitized,sanitize,-Db_sanitize=address$(comma)undefined,$(call library,asan) $(call library,ubsan),,$(SANITIZED_TESTS))

# ThreadSanitizer knows no other layout of memory than the one without randomization.
races: export TSAN_OPTIONS := halt_on_error=1,die_after_fork=0
races: $(READY) ## Run tests of the threads under ThreadSanitizer, on the portable tier
	$(call sanitized,races,-Db_sanitize=thread -Dtiers=,$(call library,tsan),setarch -R,$(RACES_TESTS))

comma := ,

LEAK_CALLS ?= 1000000

leaks: $(READY) ## Watch memory over LEAK_CALLS small calls on every backend, and over large ones
	FASTSOFTMAX_LEAK_CALLS=$(LEAK_CALLS) $(BIN)/python -m pytest -q tests/test_process.py -k memory

mutants: $(READY) ## Break the kernels in known ways, one at a time, and see whether the tests notice
	$(BIN)/python -m tests.mutants $(MUTANTS)

# The wheel that test_packaging.py tries is not what is measured, and the Python lines are the same on older tiers.
# Numba compiles anew, as parts of the backend only run then.
coverage: $(READY) ## Measure the branch coverage of the Python package
	rm -rf build/coverage
	NUMBA_CACHE_DIR=$(CURDIR)/build/coverage/numba \
		$(BIN)/python -m coverage run -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		--ignore tests/test_packaging.py -k "not portable and not x86_64_v2"
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

# As slow as -O3 is to build, it has no part in whether the oldest releases will do.
test-oldest: export PATH := $(CURDIR)/.venv-oldest/bin:$(PATH)
test-oldest: ## Build with the oldest releases that pyproject.toml admits, and run all but the slowest tests
	rm -rf .venv-oldest build/oldest && mkdir -p build/oldest
	$(PYTHON) tests/oldest.py | tee build/oldest/constraints.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c build/oldest/constraints.txt meson-python cython numpy ninja
	CYTHON=$(CURDIR)/.venv-oldest/bin/cython .venv-oldest/bin/python -m pip install --quiet --no-build-isolation \
		-c build/oldest/constraints.txt --config-settings=build-dir=build/oldest/meson \
		--config-settings=setup-args=-Doptimization=1 --editable '.[test]'
	NUMBA_CACHE_DIR=$(CURDIR)/build/oldest/numba .venv-oldest/bin/python -m pytest -n auto --maxprocesses 4 \
		--dist loadfile --no-loadscope-reorder $(SLOWEST:%=--ignore tests/test_%.py)

SLOWEST := accuracy asv bench_cuda compare cuda exponential packaging

# Of the last commit.
reproduce: $(READY) ## Build source archive and wheel twice and compare the bytes; repair the wheel, install it, use it
	$(BIN)/python -m tests.reproduce $(REPRODUCE_FLAGS)

lint: $(READY) ## Check style, types and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/typos

asv: $(READY) ## Run the asv benchmarks and publish them to .asv/html
	$(BIN)/asv --config asv.json machine --yes
	$(BIN)/asv --config asv.json run --set-commit-hash="$$(git rev-parse HEAD)" $(ASV_FLAGS)
	$(BIN)/asv --config asv.json publish

wheel: $(READY) ## Build a source archive, and a wheel from it, in dist/
	$(BIN)/python -m build

clean: ## Remove the venv and everything built or cached
	rm -rf .venv .venv-oldest .asv .hypothesis .benchmarks .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What a fresh machine may lack, and the line that mends it.
missing = { echo "fastsoftmax needs $(1). On Debian or Ubuntu: apt-get install $(APT_PACKAGES)" >&2; exit 1; }
APT_PACKAGES := python3-venv python3-dev gcc

$(READY): EXTRAS := test,bench,dev
$(READY): pyproject.toml meson.build
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || $(call missing,Python 3.10 or newer)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(call missing,Python with its venv module)
	@$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
		|| $(call missing,Python.h)
	@command -v $(firstword $(CC)) >/dev/null || $(call missing,a C compiler)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet meson-python cython numpy ninja
	$(INSTALL)
	@touch $@

# PyPI's torch for Linux brings gigabytes of CUDA along; that of PyTorch's own index, tried first, does not.
$(PEERS): EXTRAS := peers
$(PEERS): $(READY)
	-$(BIN)/python -m pip install --quiet --retries 0 --index-url https://download.pytorch.org/whl/cpu torch
	$(INSTALL)
	@touch $@

INSTALL = CYTHON=$(CURDIR)/$(BIN)/cython \
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[$(EXTRAS)]'

