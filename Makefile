# Every target that runs something prepares .venv first; a second call finds it ready.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.SILENT:
.DEFAULT_GOAL := help
.PHONY: help demo test bench gpu fuzz sanitize soak lint format pin clean FORCE

READY := .venv/ready
BIN := .venv/bin
# What pip may take of the ranges in pyproject.toml.
VERSIONS ?= tested
tested := constraints/tested.txt
lowest := .venv/lowest.txt
newest := /dev/null
CONSTRAINTS := $(or $($(filter tested lowest newest,$(VERSIONS))),$(error \
  VERSIONS must be tested, lowest or newest, got $(VERSIONS)))
C_FILES := $(shell find csrc kernels tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')
# Idle OpenMP threads sleep: spinning ones would take the cores from the others.
export OMP_WAIT_POLICY := passive
ifdef CI
export TQDM_DISABLE := 1
export PIP_PROGRESS_BAR := off
endif

help:  ## List the targets
	echo "Set-up: Python >= 3.11, a C++ compiler, 9 GB of disk; about 4 minutes, once. PYTHON=... picks the"
	echo "interpreter, VERSIONS=tested|lowest|newest those of the packages, ULFINE_CUDA=AUTO|ON|OFF the CUDA kernels;"
	echo "ARGS=... goes to the command that is run."
	sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

demo: $(READY)  ## Train on the built-in data and write a report
	$(BIN)/ulfine-fast demo $(ARGS)

# What the oldest packages warn of in themselves, newer ones have mended: there a warning is no error.
test: $(READY)  ## Run every test
	$(BIN)/pytest -q --numprocesses auto --dist loadfile $(if $(filter lowest,$(VERSIONS)),-W default) $(ARGS)

bench: $(READY)  ## Time every op and the head step against their rivals (9 minutes)
	export ULFINE_BENCHMARK_JSON="$${ULFINE_BENCHMARK_JSON:-bench.json}"
	# The default policy of OpenMP: with sleeping workers two threads would measure how they wake up.
	unset OMP_WAIT_POLICY
	$(BIN)/pytest -q -W default benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds $(ARGS)

# With PYTHON=... that interpreter runs everything as it is: nothing is downloaded or installed.
NVIDIA := $(wildcard /dev/nvidiactl /dev/dxg)
gpu: $(if $(NVIDIA),$(if $(PYTHON),,$(READY)))  ## Build, test and time the GPU kernels (9 minutes; STAGE=... for one stage)
	[ -n "$(NVIDIA)" ] || { echo "gpu: no NVIDIA GPU on this machine" >&2; exit 1; }
	$(or $(PYTHON),$(BIN)/python) benchmarks/gpu.py $(STAGE)

fuzz: $(READY)  ## Call the ops a million times with random arguments (half an hour; ARGS=10000 for less)
	$(BIN)/python -P tests/fuzz_ops.py $(or $(ARGS),1000000)

sanitize: $(READY)  ## Run the CPU kernels under the compiler's sanitizers (4 minutes; ARGS=address or thread)
	$(BIN)/python tests/sanitize.py $(ARGS)

soak: $(READY)  ## Kill a thousand runs and train for 100,000 steps (an hour; ARGS="kills -n 100" for less)
	$(BIN)/python tests/soak.py $(ARGS)

lint: $(READY)  ## Check style and format
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: $(READY)  ## Rewrite the sources in the house format
	$(BIN)/ruff check --quiet --fix-only .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(C_FILES)

pin: $(READY)  ## Write the versions in .venv to constraints/tested.txt
	$(BIN)/pip list --format=freeze --exclude-editable --exclude pip > $(tested)

clean:  ## Remove .venv, the builds and the caches
	rm -rf .venv build dist *.egg-info ulfine_fast/_C*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find ulfine_fast kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Runs under any Python, so that an old one can say its version.
define PROBE
import sys
name = "%s (%d.%d.%d)" % ((sys.executable,) + tuple(sys.version_info[:3]))
if sys.version_info < (3, 11):
    sys.exit("expected Python >= 3.11, got " + name)
import importlib.util, os, sysconfig
if not importlib.util.find_spec("ensurepip"):
    sys.exit(name + " has no venv module; install it (Debian, Ubuntu: python3-venv)")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit(name + " has no C headers; install them (Debian, Ubuntu: python3-dev)")
print(name)
endef
export PROBE

# Every lower bound of pyproject.toml as a version.
define LOWEST
import re
bounds = re.findall(r"[\"']([\w-]+)>=([\d.]+)", open("pyproject.toml").read())
print(*sorted(set(map("==".join, bounds))), sep="\n")
endef
export LOWEST

# The first line of the log that names an error; CMake puts its text on the line below.
define FIRST_ERROR
cmake && NF { found = $$0; exit }
/CMake Error/ { cmake = 1 }
/connection broken/ { offline = "no network? " }
/subprocess-exited-with-error|-failed$$/ { next }
/(^|[ :])([A-Za-z]*Error|error|ERROR): / || /No space left on device/ { found = $$0; exit }
NF { last = $$0 }
END { if (!found) found = last; sub(/^[ ×╰─>]+/, "", found); print offline found }
endef
export FIRST_ERROR

# Another choice than last time, or another place, sets up again.
MADE := $(CURDIR) PYTHON=$(PYTHON) VERSIONS=$(VERSIONS)
CHOICE := $(MADE) ULFINE_CUDA=$(ULFINE_CUDA)
ifneq ($(shell cat $(READY) 2>/dev/null),$(CHOICE))
$(READY): FORCE
endif

$(READY): pyproject.toml setup.py CMakeLists.txt $(shell find csrc) $(wildcard $(CONSTRAINTS:/%=))
	rm -f $@
	log=.venv/setup.log
	fail() { echo "set-up failed: $$*" >&2; exit 1; }
	run() { "$$@" >> $$log 2>&1 || fail "$$(awk "$$FIRST_ERROR" $$log) (log: $$PWD/$$log)"; }

	read -ra compiler <<< "$${CXX:-c++}"
	command -v "$${compiler[0]}" > /dev/null ||
	  fail "expected a C++ compiler, got no $${compiler[0]}; install g++ or set CXX"
	if ! { [ "$$(cat .venv/made 2> /dev/null)" = "$(MADE)" ] && $(BIN)/python -c "$$PROBE" > /dev/null 2>&1; }; then
	  candidates=(python3.11 python3.12 python3.13 python3.14 python3)
	  if [ -n "$(PYTHON)" ]; then candidates=("$(PYTHON)"); fi
	  python= first=
	  for name in "$${candidates[@]}"; do
	    "$$name" -c "" 2> /dev/null || continue
	    if said=$$("$$name" -c "$$PROBE" 2>&1); then python=$$name; break; fi
	    first=$${first:-$$said}
	  done
	  [ -n "$$python" ] || fail "$${first:-expected Python >= 3.11, got none of $${candidates[*]}}"
	  free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }')
	  [ "$$free" -ge 9 ] || fail "expected 9 GB of free disk for torch and its CUDA libraries, got $$free GB"
	  echo "set-up 1/3: .venv for $$said (10 s)"
	  rm -rf .venv; mkdir .venv
	  run "$$python" -m venv .venv
	  echo "$(MADE)" > .venv/made
	fi
	rm -f $$log
	# Downloads are unpacked where the free space was measured.
	export TMPDIR="$$PWD/.venv/tmp" PATH="$$PWD/$(BIN):$$PATH"
	mkdir -p "$$TMPDIR"
	echo "set-up 2/3: build tools (20 s)"
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > .venv/build-tools.txt
	$(BIN)/python -c "$$LOWEST" > $(lowest)
	run $(BIN)/pip install -q -c $(CONSTRAINTS) -r .venv/build-tools.txt
	echo "set-up 3/3: torch and the other dependencies, then the C++ build (4 minutes, 1 when only sources changed)"
	run $(BIN)/pip install -q -c $(CONSTRAINTS) --no-build-isolation -e ".[dev]"
	rm -rf "$$TMPDIR"
	run $(BIN)/python -P -c "import ulfine_fast._C"
	echo "$(CHOICE)" > $@
