# Two commands: `make engine MODEL=resnet50` and `make test`. Everything is installed into .venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

MODEL  ?=
TARGET ?= ort-cpu
# Extra flags for `toolchain build`, such as ARGS="--verify-each --dump-dir dump".
ARGS   ?=
# fp32, int8 or auto; int8 needs DATA, samples to calibrate on.
PRECISION ?=
DATA   ?=
EVAL   ?=
# How images become inputs of a bare .onnx: the name of a zoo model, or a JSON file.
PREPROCESSING ?=
WEIGHTS ?=
OUT    ?=

.DEFAULT_GOAL := help
.PHONY: help install engine test test-gpu lint types check bench bench-gpu doctor clean

help:
	@echo 'make engine MODEL=resnet50 [TARGET="ort-cpu"] [EVAL=folder] [WEIGHTS=auto|random|PATH]'
	@echo '            [PRECISION=int8 DATA=folder] [PREPROCESSING=name] [OUT=folder] [ARGS=...]'
	@echo 'make test      lint, types and the whole test suite'
	@echo 'make test-gpu  the tests that need an NVIDIA GPU; PYTHON=... takes an environment that is there (docs/gpu.md)'
	@echo 'make bench     the measurements of benchmarks/'
	@echo 'make bench-gpu the measurements on a GPU, likewise'
	@echo 'make doctor    what this machine can run, and why not'
	@echo 'make clean     removes .venv and build leftovers; artifacts/ stays'

# Two runtimes are installed when a TARGET asks for them: TensorRT, which comes from NVIDIA's own index, and the build of
# ONNX Runtime for CUDA, which takes the place of the other.
comma := ,
ORT    := $(if $(filter ort-cuda ort-cuda:%,$(TARGET)),ort-cuda,ort-cpu)
TRT    := $(if $(filter tensorrt tensorrt:%,$(TARGET)),$(comma)tensorrt)
EXTRAS := build,$(ORT),openvino-cpu,tensorrt-rtx$(TRT),export,images,install,sign,serve,dev
STAMP  := $(VENV)/installed-$(ORT)$(subst $(comma),-,$(TRT))

# Installed again when the list of packages changes; a half-finished install leaves no stamp.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV) (the first time takes a few minutes) ...'
	@rm -f $(VENV)/installed-*
	@$(BIN)/python -m pip uninstall --quiet --yes $(if $(filter ort-cuda,$(ORT)),onnxruntime,onnxruntime-gpu) 2>/dev/null
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

install: $(STAMP)

# Handed over through the environment, not spliced into the shell's text: names may hold quotes and spaces.
export MODEL TARGET PRECISION DATA EVAL PREPROCESSING WEIGHTS OUT
engine: install
	@test -n "$$MODEL" || { echo 'which model? make engine MODEL=resnet50 (or a .onnx, .pt2, file.py:factory, hf:..., recipe.yaml)'; exit 2; }
	@$(BIN)/toolchain build "$$MODEL" $(foreach t,$(TARGET),--target '$(t)') $(if $(EVAL),--eval-data "$$EVAL") \
		$(if $(PRECISION),--precision "$$PRECISION") $(if $(DATA),--data "$$DATA") \
		$(if $(PREPROCESSING),--preprocessing "$$PREPROCESSING") $(if $(WEIGHTS),--weights "$$WEIGHTS") $(if $(OUT),--output "$$OUT") $(ARGS)

test: check
	$(BIN)/python -m pytest -q

# Not in .venv: onnxruntime-gpu and onnxruntime install the same module, and GPU machines come with their own CUDA.
# PYTHONPATH may name the folder into which packages were unpacked.
ON_GPU := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)

test-gpu:
	$(ON_GPU) -m pytest -q -rs -o addopts= tests/gpu

bench-gpu:
	$(ON_GPU) benchmarks/gpu.py

check: lint types

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/run_all.py

doctor: install
	@$(BIN)/toolchain doctor

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
