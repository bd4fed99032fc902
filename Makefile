# The verbs. `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
GEN := .venv-gen/bin/python tools/gen_proto.py
CSRC := setup.py $(wildcard csrc/*.*)

# Tests start hundreds of Python processes, each of which would compile our source anew.
export PYTHONDONTWRITEBYTECODE :=

soak: SECONDS ?= 300
chaos: SECONDS ?= 10
fuzz: SECONDS ?= 60
mutants: COUNT ?= 40

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-clients test-models test-export test-channels-last test-gradients test-beside test-s3 test-interventions test-beside-interventions test-zoo test-packages test-ray soak chaos storm fuzz mutants bench bench-cuda bench-dataset bench-peers bench-ray bench-sentences perf-analyzer check check-deploy fmt gen clean

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/.built .venv-gen/.installed .venv-triton/.installed ## make the environments and build the extension

demo: .venv/.built ## start a server, ask it for layers, show what comes back
	$(BIN)/python examples/python/demo.py

serve: .venv/.built ## serve a model: make serve ARGS="--help"
	$(BIN)/layertap serve $(ARGS)

# Without ARGS all tests but long proofs, in one process more than CI has cores, as many tests wait
# for another process or a timer now and then. Tests of one file stay together, as they share servers.
test: setup ## run the tests; LONG=1 runs long proofs too: make test ARGS="tests/wire -k varint"
	$(BIN)/python -m pytest $(or $(ARGS),-n 3 --dist loadfile --no-loadscope-reorder \
	  $(if $(LONG),,-m "not long"))

test-clients: setup ## the clients in other languages against a real server
	$(BIN)/python -m pytest tests/languages/check_*.py $(ARGS)

test-models: setup ## every layer of every model by every extractor; writes docs/coverage.md
	$(BIN)/python -W ignore tests/coverage/prove.py --write docs/coverage.md $(ARGS)

test-export: .venv/.built ## every layer of every model by EXPORT; writes docs/coverage.md: hours
	$(BIN)/python -W ignore tests/coverage/prove_export.py --jobs 2 --rows tests/coverage/rows/export.json \
	  --write docs/coverage.md $(ARGS)

test-channels-last: .venv/.built ## every layer of every model by TORCHSCRIPT with channels last; writes docs/coverage.md
	$(BIN)/python -W ignore tests/coverage/prove_channels_last.py --jobs 2 \
	  --rows tests/coverage/rows/channels_last.json --write docs/coverage.md $(ARGS)

test-gradients: .venv/.built ## the gradient of every layer of every model; writes docs/coverage.md: hours
	$(BIN)/python -W ignore tests/coverage/prove_gradients.py --rows tests/coverage/rows/gradients.json \
	  --write docs/coverage.md $(ARGS)

test-beside: .venv/.built build/beside/.installed ## gradients beside captum and pytorch-grad-cam; writes docs/coverage.md
	PYTHONPATH=server build/beside/bin/python -W ignore tests/coverage/beside_others.py \
	  --rows build/beside.json --write docs/coverage.md $(ARGS)

test-s3: .venv/.built build/s3/.installed ## data sets in S3, with a server of it; kill -9 and go on: a minute
	PYTHONPATH=server build/s3/bin/python -m pytest -q -s tests/dataset/check_s3.py $(ARGS)

test-interventions: .venv/.built ## interventions at layers of every model; writes docs/coverage.md: an hour
	$(BIN)/python -W ignore tests/coverage/prove_interventions.py --rows tests/coverage/rows/interventions.json \
	  --write docs/coverage.md $(ARGS)

test-beside-interventions: .venv/.built build/interpretability/.installed ## interventions beside TransformerLens and pyvene; writes docs/coverage.md
	PYTHONPATH=server build/interpretability/bin/python -W ignore \
	  tests/coverage/beside_interventions.py --write docs/coverage.md $(ARGS)

test-zoo: setup ## every layer of every awkward model, in every way; writes docs/coverage.md
	$(BIN)/python -W ignore tests/zoo/prove_zoo.py --write docs/coverage.md $(ARGS)

test-packages: .venv/.built ## models of public packages, in environments of their own: an hour
	$(BIN)/python tools/drive_packages.py --write docs/coverage.md $(ARGS)

test-ray: .venv/.built ## Ray: replicas killed, updated and scaled under load, drivers killed: ten minutes
	$(BIN)/python -m pytest -q -s tests/check_ray_*.py $(ARGS)

soak: .venv/.built ## bad clients, overload and reloads at once, 5 minutes: make soak SECONDS=60
	PYTHONPATH=tests $(BIN)/python tests/soak/endure.py --seconds $(SECONDS) $(ARGS)

chaos: .venv/.built ## take disk, threads, memory, files and clients away from a server, 3 minutes
	PYTHONPATH=tests:tests/soak:tests/chaos $(BIN)/python tests/chaos/drill.py \
	  --seconds $(SECONDS) $(ARGS)

storm: .venv/.built build/storm ## 256 callers that ask again at once, a minute and a half: needs Go
	PYTHONPATH=server:benchmarks $(BIN)/python -W ignore benchmarks/bench_storm.py \
	  --generator build/storm $(ARGS)

fuzz: .venv/.built build/fuzz/.installed ## fuzz the decoder against upb: make fuzz SECONDS=600
	$(BIN)/python tools/fuzz.py --seconds $(SECONDS) $(ARGS)

mutants: setup ## change the core in small ways and see whether the tests notice: make mutants COUNT=20
	$(BIN)/python tools/mutants.py --count $(COUNT) $(ARGS)

bench: .venv/.built ## what layers and replies cost, in minutes; writes benchmarks/README.md
	$(BIN)/python -W ignore benchmarks/bench_extractors.py --rounds 10 $(ARGS)
	$(BIN)/python -W ignore benchmarks/bench_matrix.py
	$(BIN)/python -W ignore benchmarks/bench_races.py
	$(BIN)/python -W ignore benchmarks/bench_packages.py
	$(BIN)/python -W ignore benchmarks/bench_start.py
	$(BIN)/python -W ignore benchmarks/bench_first_runs.py
	$(BIN)/python -W ignore benchmarks/bench_wire.py --rounds 8 $(ARGS)
	$(BIN)/python -W ignore benchmarks/bench_server.py
	$(BIN)/python -W ignore benchmarks/bench_encode.py
	$(BIN)/python -W ignore benchmarks/bench_branches.py
	$(BIN)/python -W ignore benchmarks/bench_text.py
	$(BIN)/python -W ignore benchmarks/bench_hook.py
	$(BIN)/python -W ignore benchmarks/bench_images.py
	$(BIN)/python -W ignore benchmarks/bench_gradients.py
	$(BIN)/python -W ignore benchmarks/bench_interventions.py
	$(BIN)/python -W ignore benchmarks/bench_memory.py
	$(BIN)/python -W ignore benchmarks/bench_growth.py

# For a machine with a GPU, which may have neither network nor the versions of constraints.txt: with
# the Python and the torch that are there, and nothing installed.
CUDA_RESULTS = benchmarks/cuda
bench-cuda: ## extractors, CUDA graphs and a server on a GPU, in minutes: make bench-cuda PYTHON=python3
	$(PYTHON) setup.py --quiet egg_info build_ext --inplace
	PYTHONPATH=server $(PYTHON) -W ignore benchmarks/bench_matrix.py --device cuda \
	  --batches 1 8 32 --seconds 1 --results $(CUDA_RESULTS) $(ARGS)
	PYTHONPATH=server $(PYTHON) -W ignore benchmarks/bench_matrix.py --device cuda --tf32 \
	  --batches 1 32 --sets shallow deep --seconds 1 --results $(CUDA_RESULTS)
	PYTHONPATH=server $(PYTHON) -W ignore benchmarks/bench_gpu_server.py --rounds 5 \
	  --results $(CUDA_RESULTS)

bench-sentences: .venv/.built build/sentences/.installed ## sentences a second, beside sentence-transformers
	PYTHONPATH=server build/sentences/bin/python -W ignore benchmarks/bench_sentences.py $(ARGS)

PEERS := litserve pytriton ray
bench-peers: .venv/.built $(PEERS:%=build/peers/%/.installed) ## beside PyTriton, LitServe, Ray Serve and bare gRPC: an hour
	PYTHONPATH=server $(BIN)/python -W ignore benchmarks/bench_peers.py $(ARGS)

bench-dataset: .venv/.built build/dataset/.installed ## photos a second of layertap extract, beside thingsvision: an hour
	PYTHONPATH=server $(BIN)/python -W ignore benchmarks/bench_dataset.py $(ARGS)

bench-ray: .venv/.built ## Ray Serve's proxy beside direct calls, and two actors beside one: ten minutes
	$(BIN)/python -W ignore benchmarks/bench_ray_serve.py $(ARGS)
	$(BIN)/python -W ignore benchmarks/bench_ray_data.py $(ARGS)

perf-analyzer: .venv/.built ## NVIDIA's load generator against a served resnet18, three ways
	$(BIN)/python tools/perf_analyzer.py $(ARGS)

# Benchmarks hand lambdas with defaults around, and import the peers of other environments.
LENIENT := $(foreach code,misc no-any-return import-not-found import-untyped,--disable-error-code $(code))

check: setup ## formatting, lint, types, layers, generated code, errors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=server:benchmarks $(BIN)/mypy benchmarks $(LENIENT)
	$(BIN)/lint-imports
	$(GEN) --check
	$(BIN)/python tools/gen_settings.py --check
	$(BIN)/python -m pytest -q tests/services/test_error_codes.py

check-deploy: .venv/.built ## the Helm chart and the alert rules, by helm, kubeconform and promtool (needs Go)
	$(BIN)/python tools/check_deploy.py

fmt: setup ## format and sort imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

gen: setup ## write the generated code from proto/, and docs/settings.md
	$(GEN)
	$(BIN)/python tools/gen_settings.py

clean: ## remove what was built and cached; the environments stay
	rm -rf build dist server/layertap.egg-info server/layertap/_core*.so .venv/.built
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# uv takes a sixth of the time that pip takes for all this. It doesn't read pip's configuration, so
# where it isn't there or can't reach a registry, pip does the work.
export UV_HTTP_TIMEOUT ?= 180
install = $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt $(1) \
  || $(BIN)/pip install --quiet -c constraints.txt $(1)

# Three stamps, so that a change does only its own work: dependencies are installed again when they
# change, the extension is rebuilt when C++ changes, the generator hardly ever.
# The build tools come from constraints.txt too, so nothing is built in an isolated environment,
# which would fetch versions of its own.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	-$(BIN)/pip install --quiet -c constraints.txt uv
	$(call install,setuptools pybind11)
	$(call install,--no-build-isolation -e ".[dev]")
	touch $@ .venv/.built

# Nothing to do where the install above has just built it.
.venv/.built: .venv/.installed $(CSRC)
	test -e $@ && test -z "$$(find $(CSRC) -newer $@)" || \
	  $(BIN)/python setup.py --quiet build_ext --inplace --force
	touch $@

# The generator is older than the runtime on purpose: tools/gen-requirements.txt says why.
.venv-gen/.installed: tools/gen-requirements.txt
	test -x .venv-gen/bin/python || $(PYTHON) -m venv .venv-gen
	.venv-gen/bin/pip install --quiet -r tools/gen-requirements.txt
	touch $@

# NVIDIA's client, for the tests of the Open Inference Protocol.
.venv-triton/.installed: tools/triton-requirements.txt
	test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --quiet -r tools/triton-requirements.txt
	touch $@

# Beside the environment, not in it: one package that only `make fuzz` needs. Where it has no wheel
# the fuzzer does without.
build/fuzz/.installed: tools/fuzz-requirements.txt
	mkdir -p build/fuzz
	-$(BIN)/pip install --quiet --only-binary :all: --upgrade --target build/fuzz/python -r $<
	touch $@

# The load generator: callers in Python would be the slower part.
build/storm: tools/storm/main.go tools/storm/go.mod tools/storm/go.sum
	mkdir -p build
	cd tools/storm && go build -o ../../build/storm .

# It sees what the main environment has, PyTorch above all, by a .pth file.
build/sentences/.installed: tools/sentences-requirements.txt .venv/.installed
	test -x build/sentences/bin/python || $(BIN)/python -m venv build/sentences
	$(BIN)/python -c 'import site; print("\n".join(site.getsitepackages()))' \
	  > $$(echo build/sentences/lib/python3*/site-packages)/main-environment.pth
	build/sentences/bin/pip install --quiet -c constraints.txt -r $<
	touch $@

# As the one above. Its own packages are listed, as thingsvision would bring the whole of TensorFlow.
build/dataset/.installed: tools/dataset-requirements.txt .venv/.installed
	test -x build/dataset/bin/python || $(BIN)/python -m venv build/dataset
	$(BIN)/python -c 'import site; print("\n".join(site.getsitepackages()))' \
	  > $$(echo build/dataset/lib/python3*/site-packages)/main-environment.pth
	build/dataset/bin/pip install --quiet -c constraints.txt -r $<
	build/dataset/bin/pip install --quiet --no-deps thingsvision==2.7.3
	touch $@

# As the one above, an environment for each server that layertap is compared with. An environment that
# can't be made does not stop the others: its server is then left out, and the results say so.
# PyTriton's wheel has its own CPython, 3.11 of an early patch level, which can't run the standard library of
# a later one. So its environment takes the first Python that is early enough.
PYTRITON_PYTHON ?= $(shell $(BIN)/python tools/peers/early_python.py)
build/peers/%/.installed: tools/peers/%-requirements.txt .venv/.installed
	mkdir -p build/peers
	-rm -rf build/peers/$* && \
	  $(if $(filter pytriton,$*),$(PYTRITON_PYTHON),$(BIN)/python) -m venv build/peers/$* && \
	  $(BIN)/python -c 'import site; print("\n".join(site.getsitepackages()))' \
	  > $$(echo build/peers/$*/lib/python3*/site-packages)/main-environment.pth && \
	  build/peers/$*/bin/pip install --quiet -r $< && touch $@

# As the one above. s3fs and moto need older versions of what other tests use.
build/s3/.installed: tools/s3-requirements.txt .venv/.installed
	test -x build/s3/bin/python || $(BIN)/python -m venv build/s3
	$(BIN)/python -c 'import site; print("\n".join(site.getsitepackages()))' \
	  > $$(echo build/s3/lib/python3*/site-packages)/main-environment.pth
	build/s3/bin/pip install --quiet -r $<
	touch $@

# As the one above.
build/beside/.installed: tools/attribution-requirements.txt .venv/.installed
	test -x build/beside/bin/python || $(BIN)/python -m venv build/beside
	$(BIN)/python -c 'import site; print("\n".join(site.getsitepackages()))' \
	  > $$(echo build/beside/lib/python3*/site-packages)/main-environment.pth
	build/beside/bin/pip install --quiet -c constraints.txt -r $<
	touch $@

# As the one above.
build/interpretability/.installed: tools/interpretability-requirements.txt .venv/.installed
	test -x build/interpretability/bin/python || $(BIN)/python -m venv build/interpretability
	$(BIN)/python -c 'import site; print("\n".join(site.getsitepackages()))' \
	  > $$(echo build/interpretability/lib/python3*/site-packages)/main-environment.pth
	build/interpretability/bin/pip install --quiet -c constraints.txt -r $<
	touch $@
