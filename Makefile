# make quickstart | test | check | bench | offline | gpu-check — each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
OUT ?=
SECTIONS ?=
MINUTES ?= 10
JOBS ?= 2
VERSION ?=
WHEELS ?= .wheels
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard $(addprefix csrc/,*/*.cpp */*.cu */*.cuh */*.h include/afd/*.h))
SHIM := $(wildcard $(addprefix tests/cuda_on_cpu/,*/*.cpp */*.cu */*.h))

# A minute's part of the tests: the house, the ops against their references, and what every run needs.
FAST := tests/test_architecture.py tests/contract/test_plans.py tests/contract/test_requests.py \
        $(filter-out %memory.py %loss_scale.py,$(wildcard tests/ops/test_*.py)) \
        $(patsubst %,tests/afd/test_%.py,afd_method answers causal_wan checkpoint cli config \
        discriminators files folder kv_cache ledger optimizer policies rollout schedules)

.PHONY: docs live quickstart quickstart-full test test-fast soak lowest check format bench offline gpu-check \
        gpu-rehearsal gpu-wheels wheels extras release-notes base motion-backbone screenshot readme lock \
        setup clean

quickstart: setup ## base, SFT and AFD on a laptop; ends with the path of report.html
	$(BIN)/afd quickstart $(ARGS)

live: setup ## the laptop student's stream in the browser; ARGS goes to afd live
	$(BIN)/afd live --open $(ARGS)

quickstart-full: setup ## the whole table: every teacher, run and control, three seeds
	$(BIN)/afd ablation ablations/quickstart_full $(ARGS)

test: setup ## every test that needs no GPU, in JOBS processes; ARGS goes to pytest
	$(BIN)/python -m pytest tests --ignore tests/offline -n $(JOBS) --dist worksteal $(ARGS)

test-fast: setup ## a part of the tests that takes a minute
	$(BIN)/python -m pytest $(FAST) -m "not slow and not soak" -k "not triton" $(ARGS)

offline: setup ## compile every GPU kernel for every target and hold it to its budget
	$(BIN)/python -m pytest tests/offline $(ARGS)

soak: setup ## the long tests: sanitizers, then property tests with new seeds for MINUTES
	$(BIN)/python -m tests.properties.soak --minutes $(MINUTES)

lowest: setup ## the tests of every dependency at its lower bound, in an environment of their own
	$(BIN)/python -m tests.lowest $(ARGS)

extras: setup ## every extra in an environment of its own; ARGS chooses, such as "bare train"
	$(BIN)/python -m tests.fresh $(ARGS)

wheels: setup ## release wheels of the Pythons that are here, and the source distribution, in dist/
	$(BIN)/python -m tests.wheels $(ARGS)

release-notes: setup ## the section of CHANGELOG.md for VERSION, by default this one
	$(BIN)/python -m docs.release_notes $(VERSION)

check: setup ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(SHIM)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(SHIM)

bench: setup ## the benchmarks of this device; tables, JSON and plots in benchmarks/results/
	$(BIN)/python -m benchmarks.nft_loss --all --plot
	$(BIN)/python -m benchmarks.host_overhead
	$(BIN)/python -m benchmarks.forward_noise --plot
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.row_ops
	$(BIN)/python -m benchmarks.rollout
	$(BIN)/python -m benchmarks.videos
	$(BIN)/python -m benchmarks.clips
	$(BIN)/python -m benchmarks.live
	$(BIN)/python -m benchmarks.train_step

gpu-check: ## build, test and measure on a GPU box with what it has; needs no network
	$(PYTHON) -m benchmarks.gpu_check $(if $(OUT),--out $(OUT)) \
	  $(if $(SECTIONS),--sections $(SECTIONS)) $(if $(wildcard $(WHEELS)),--wheels $(WHEELS)) $(ARGS)

gpu-rehearsal: setup ## gpu-check on a simulated GPU: seconds by section against their limits
	$(BIN)/python -m benchmarks.gpu_rehearsal $(if $(OUT),--out $(OUT)) \
	  $(if $(SECTIONS),--sections $(SECTIONS)) $(ARGS)

# Of Python 3.12 on x86-64, at the lock's versions. pip matches each platform exactly.
gpu-wheels: ## fetch what gpu-check's sections want and a bare GPU box may lack; carry the folder there
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --constraint requirements.lock \
	  --implementation cp --python-version 3.12 --platform manylinux_2_28_x86_64 \
	  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest $(WHEELS) \
	  einops pydantic pydantic-core annotated-types typing-inspection hypothesis sortedcontainers \
	  diffusers importlib-metadata zipp pillow requests charset-normalizer idna urllib3 certifi

base: setup ## make the shipped base student again
	$(BIN)/python -m afd.lab.pretrain base

motion-backbone: setup ## make the shipped motion backbone again
	$(BIN)/python -m afd.lab.pretrain motion-backbone

screenshot: setup ## docs/quickstart.png and docs/live.png from the last quickstart; needs chromium
	$(BIN)/python docs/screenshot.py runs/quickstart docs/quickstart.png
	$(BIN)/python docs/live_screenshot.py runs/quickstart/afd docs/live.png

docs: setup ## the documentation site in site/; open site/index.html
	$(BIN)/python -m mkdocs build --strict --quiet

readme: setup ## fill README's tables from the last quickstart and benchmarks
	$(BIN)/python -m docs.fill_readme

lock: setup ## pin every dependency again
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.10 --no-header --no-annotate --extra dev \
	  pyproject.toml build-requirements.in --output-file requirements.tmp --quiet
	head -2 requirements.lock > requirements.new
	grep -v -E '^(nvidia-|cuda-)' requirements.tmp >> requirements.new
	mv requirements.new requirements.lock
	rm requirements.tmp

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf build $(VENV) afd_kernels/_native*.so *.egg-info
