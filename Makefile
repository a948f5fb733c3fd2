# Everything is set up in .venv by the first target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VENV_RAY := .venv-ray

.PHONY: demo test test-ray lint types bench soak conformance oldest clean

demo: $(VENV)/installed
	$(BIN)/flexgen-lite demo $(if $(QUANTIZATION),--quantization $(QUANTIZATION))

# The tests start hundreds of processes that import the same modules: bytecode is kept, whatever the shell says.
test test-ray conformance oldest: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=10

test-ray: $(VENV_RAY)/installed
	$(VENV_RAY)/bin/python -m pytest tests/ray tests/unit/benchmarks --durations=10

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.peers

soak: $(VENV)/installed
	$(BIN)/python -m tests.soak

# The oldest Transformers that pyproject.toml allows, over what is installed.
oldest: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oldest transformers==5.17.0 tokenizers==0.23.2 huggingface-hub==1.33.0
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -n 2 --dist loadfile tests/e2e/test_families.py tests/e2e/test_gguf.py tests/unit/workers/model

conformance: $(VENV)/installed
	$(BIN)/python -m pytest -n 3 tests/conformance/text.py tests/conformance/models.py
	$(BIN)/python -m tests.conformance.models

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Ray is large: it has an environment of its own, which takes everything else from the ordinary one.
$(VENV_RAY)/installed: $(VENV)/installed constraints-ray.txt
	$(PYTHON) -m venv $(VENV_RAY)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> `$(VENV_RAY)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"`/ordinary.pth
	$(VENV_RAY)/bin/python -m pip install --quiet --constraint constraints.txt --constraint constraints-ray.txt \
		--editable '.[ray]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV_RAY) build dist *.egg-info
