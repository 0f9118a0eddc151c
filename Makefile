# Everything from a fresh clone: `make run` makes .venv and draws. `make help` lists the rest.

MODEL ?= miniature
# One or several of seg canny hed lineart depth, or all. Each is drawn on its own.
COND ?= seg
# 512 or WxH; empty takes the model's own size. Empty STEPS takes the model's own number.
SIZE ?=
STEPS ?=
# Further options of bench, parity and consistency.
FLAGS ?=
PYTHON ?= python3
# Where torch comes from; empty is pip's own index, whose Linux build brings gigabytes of CUDA packages along.
# Without an NVIDIA GPU: make TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
# pip's exit status counts, not that of what shortens its output.
SHELL := bash
.SHELLFLAGS := -o pipefail -c

# onnxruntime and onnxruntime-gpu break each other, so exactly one of the extras is ever installed.
# The driver is asked, not nvidia-smi, which many containers lack.
DEVICE := $(or $(shell $(PYTHON) gpu.py 2>/dev/null),cpu)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt
# A first install takes minutes: every package is named when its turn comes.
NAMED := | sed -un 's/^Collecting \([^ ]*\).*/  \1/p; s/^Installing collected packages.*/  unpacking/p'
# Pinned on the command line too: pip would else take a newer build, and with it gigabytes of CUDA packages.
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# The packages of an extra, for pip's command line.
export EXTRA := import sys, tomllib; \
	print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'][sys.argv[1]])

SIZED := $(if $(SIZE),--size $(SIZE))
STEPPED := $(if $(STEPS),--steps $(STEPS))

# Measured are all conditions that a COND on the command line does not narrow down; latency is that of one.
MEASURED := $(addprefix --cond ,$(if $(filter file,$(origin COND)),all,$(COND)))
TIMED := --cond $(if $(filter all,$(COND)),seg,$(firstword $(COND)))

# A worker for each core, of which every one holds PyTorch: four at most. What a test file sets up is set up once.
WORKERS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 15

.PHONY: run demo bundle test test-fast fuzz reliability service-load first-contact test-gpu lint types package test-sdist test-wheel engines bench parity \
	consistency tune report tables docs clean help

# The embedded model runs without an export, and so without PyTorch; any other model is exported first.
EMBEDDED := $(and $(filter miniature miniature-lcm miniature-controlnet,$(MODEL)),$(if $(SIZE),,yes))

run: $(if $(EMBEDDED),$(VENV)/run.stamp,bundle)  ## draw MODEL's example of each COND; what is missing is exported first
	@conditions="$(COND)"; \
	if [ "$$conditions" = all ]; then \
		conditions=$$($(BIN)/python -c "from cnpp_trt.conditions import CONDITIONS; print(*CONDITIONS)"); \
	fi; \
	for condition in $$conditions; do \
		$(BIN)/cnpp-trt run --model "$(MODEL)" --cond "$$condition" --precision fp32 $(SIZED) $(STEPPED) || exit $$?; \
	done

demo: $(VENV)/demo.stamp  ## a page in the browser: paint a segmentation, upload a condition; at http://127.0.0.1:7860
	$(BIN)/cnpp-trt demo $(FLAGS)

bundle: $(VENV)/export.stamp  ## export MODEL with each COND (and SIZE) into CNPP_TRT_HOME, or the user's cache folder
	$(BIN)/cnpp-trt export --model "$(MODEL)" $(addprefix --cond ,$(COND)) $(SIZED)

test: $(VENV)/test.stamp  ## every test that needs no GPU, on all cores
	@$(WORKERS)

test-fast: $(VENV)/test.stamp  ## tests for every change: neither marked `slow` nor slow when they last ran here
	@$(WORKERS) -m "not slow" --fast

fuzz: $(VENV)/test.stamp  ## ten times as many fuzzed inputs as `make test`, from another seed
	@CNPP_TRT_FUZZ=10 CNPP_TRT_FUZZ_SEED=$$(date +%s) $(BIN)/python -m pytest tests/fuzz

reliability: $(VENV)/test.stamp  ## fuzz, flip bits, kill, signal; writes docs/reliability.md (FLAGS="--only fuzz")
	@PYTHONPATH=tests $(BIN)/python -m reliability $(FLAGS)

first-contact: $(VENV)/engines.stamp  ## what a GPU does with this package, stage by stage, and what to paste of it
	$(BIN)/cnpp-trt export --precision fp16 --cond all
	$(BIN)/cnpp-trt first-contact $(FLAGS)

test-gpu: $(VENV)/test.stamp  ## tests on an NVIDIA GPU; without one they skip and say so
	@$(BIN)/python -m pytest tests/gpu -rs

lint: $(VENV)/lint.stamp  ## ruff and codespell; installs nothing else
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/test.stamp  ## mypy and basedpyright, of the package, its tests and examples
	$(BIN)/mypy
	$(BIN)/basedpyright

package: $(VENV)/package.stamp  ## sdist and wheel in dist/, after a look at what they hold
	@rm -rf dist
	$(BIN)/python -m hatchling build
	$(BIN)/python developer/distributions.py dist

test-sdist: package  ## `make test-fast` of the unpacked sdist, in an environment of its own
	@rm -rf build/sdist && mkdir -p build/sdist
	tar -xzf dist/*.tar.gz -C build/sdist --strip-components 1
	$(MAKE) -C build/sdist test-fast

test-wheel: package  ## the first image from the wheel, in an environment that has nothing else: no PyTorch
	$(PYTHON) -m venv --clear build/wheel
	build/wheel/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt "$$(echo dist/*.whl)[cpu]"
	cd build && wheel/bin/cnpp-trt doctor && CNPP_TRT_HOME="$$PWD/home" wheel/bin/cnpp-trt run

engines: $(VENV)/engines.stamp  ## fp16 bundle and TensorRT plans of MODEL with COND (and SIZE), on any machine
	$(BIN)/cnpp-trt build --model "$(MODEL)" $(addprefix --cond ,$(COND)) $(SIZED)

bench: $(VENV)/bench.stamp  ## latency beside PyTorch and what each technique is worth (minutes)
	$(BIN)/cnpp-trt bench --model "$(MODEL)" $(TIMED) $(SIZED) $(FLAGS)

parity: $(VENV)/bench.stamp  ## how close to PyTorch, graph by graph, step by step and in the images; a gate
	$(BIN)/cnpp-trt export --model "$(MODEL)" $(MEASURED) $(SIZED)
	$(BIN)/cnpp-trt parity --model "$(MODEL)" $(MEASURED) $(SIZED) $(FLAGS)

consistency: $(VENV)/bench.stamp  ## how well pictures follow their condition, beside PyTorch's
	$(BIN)/cnpp-trt export --model "$(MODEL)" $(MEASURED) $(SIZED)
	$(BIN)/cnpp-trt consistency --model "$(MODEL)" $(MEASURED) $(SIZED) --against pytorch $(FLAGS)

tune: $(VENV)/tune.stamp  ## the fastest setting of each COND whose pictures still follow it, as presets (FLAGS="--budget 0.5")
	$(BIN)/cnpp-trt tune --model "$(MODEL)" $(addprefix --cond ,$(COND)) $(FLAGS)

service-load: $(VENV)/test.stamp  ## the server under load, beside the bare pipeline (minutes; FLAGS="--seconds 120")
	$(BIN)/python -m cnpp_trt.developer.service_load $(FLAGS)

report: $(VENV)/bench.stamp  ## one page of all that was measured, and its Markdown twin
	$(BIN)/cnpp-trt report

tables: $(VENV)/bench.stamp  ## the tables of README, docs/benchmarks.md and docs/precision.md, from benchmarks/results
	$(BIN)/python -m cnpp_trt.developer.readme_tables README.md docs/benchmarks.md docs/precision.md

docs: $(VENV)/docs.stamp  ## the documents as a site, in site/, with the reference of the Python API
	@mkdir -p .editable && ln -sfn .. .editable/cnpp_trt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove pictures, results, build outputs and caches (not .venv, not bundles and plans)
	rm -rf cnpp-trt-runs cnpp-trt-results example-pictures build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*##  *\(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 15
	@echo "Variables: MODEL=$(MODEL) COND=\"$(COND)\" SIZE=$(SIZE) STEPS=$(STEPS) FLAGS=$(FLAGS) PYTHON=$(PYTHON)"

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

# Linters and the builders of packages and documents read files and import nothing of them: neither this package nor what it needs.
$(VENV)/lint.stamp $(VENV)/package.stamp $(VENV)/docs.stamp: $(VENV)/%.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing what \`make $*\` needs into $(VENV)"
	@$(PIP) $$($(BIN)/python -c "$$EXTRA" $*) $(NAMED)
	@touch $@

# What running needs comes first and alone: a first `make run` waits for nothing else.
$(VENV)/run.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing cnpp-trt[$(DEVICE)] into $(VENV)"
	@$(PIP) --editable '.[$(DEVICE)]' $(NAMED)
	@touch $@

$(VENV)/demo.stamp: $(VENV)/run.stamp
	@echo "installing cnpp-trt[demo] into $(VENV)"
	@$(PIP) --editable '.[$(DEVICE),demo]' $(NAMED)
	@touch $@

$(VENV)/tune.stamp: $(VENV)/run.stamp
	@echo "installing cnpp-trt[tune] into $(VENV)"
	@$(PIP) --editable '.[$(DEVICE),tune]' $(NAMED)
	@touch $@

$(VENV)/export.stamp: $(VENV)/run.stamp
	@echo "installing cnpp-trt[export] into $(VENV)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH) $(NAMED)
	@$(PIP) --editable '.[$(DEVICE),export]' $(NAMED)
	@touch $@

# TensorRT-RTX builds plans on any machine. TensorRT itself is in the extra of GPU machines.
$(VENV)/engines.stamp: $(VENV)/export.stamp
	@echo "installing cnpp-trt[rtx] into $(VENV)"
	@$(PIP) --editable '.[$(DEVICE),export,rtx]' $(NAMED)
	@touch $@

$(VENV)/bench.stamp: $(VENV)/export.stamp
	@echo "installing cnpp-trt[openvino,bench] into $(VENV)"
	@$(PIP) --editable '.[$(DEVICE),export,openvino,bench]' $(NAMED)
	@touch $@

# Compared with are two extractors of controlnet-aux and the tokenizer of open_clip_torch, which get by without their
# dependencies: their torchvision would have to be of the very build of torch that is here.
$(VENV)/test.stamp: $(VENV)/export.stamp
	@echo "installing cnpp-trt[rtx,demo,service,test,types] into $(VENV)"
	@$(PIP) --editable '.[$(DEVICE),export,rtx,demo,service,test,types]' $(NAMED)
	@$(PIP) --no-deps controlnet-aux deepcache open_clip_torch ftfy wcwidth $(NAMED)
	@touch $@
