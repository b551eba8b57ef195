# Each target sets up .venv by itself when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo chat-model test test-long test-seeds test-matrix test-newest test-machine-code test-mutants test-hopper lint format bench peers compile-check-3.6 clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/llama2 demo

# The chat model that this package ships, from the base model that it ships: about an hour. What was
# done is not done again; it begins anew without build/chat.
CHAT := build/chat
TASKS := $(CHAT)/instructions
HELD_OUT := $(CHAT)/held_out
ASKED := --dtype float32 --max-new-tokens 32
TUNED := --batch-size 4 --warmup-steps 50 --threads 1

chat-model: $(READY)
	mkdir -p $(CHAT)/results
	$(BIN)/python -m llama2.finetune.instructions --out $(TASKS)
	$(BIN)/python -m llama2.finetune.instructions --out $(HELD_OUT) --seed 1 --count 20000
	$(BIN)/llama2 sft --work $(CHAT)/sft-run --out $(CHAT)/sft --data $(TASKS)/train.jsonl \
		--held-out $(HELD_OUT)/held_out.jsonl --epochs 1 --peak-lr 2e-3 $(TUNED)
	head -n 2000 $(TASKS)/ghost.jsonl > $(CHAT)/asked.jsonl
	$(BIN)/llama2 ghost-attention --checkpoint $(CHAT)/sft --data $(CHAT)/asked.jsonl \
		--out $(CHAT)/ghost.jsonl $(ASKED)
	head -n 8000 $(TASKS)/train.jsonl > $(CHAT)/kept.jsonl
	$(BIN)/llama2 sft --work $(CHAT)/ghost-run --out $(CHAT)/chat --init $(CHAT)/sft \
		--data $(CHAT)/ghost.jsonl --data $(CHAT)/kept.jsonl \
		--held-out $(HELD_OUT)/held_out.jsonl --epochs 1 --peak-lr 5e-4 $(TUNED)
	for stage in base sft chat; do \
		checkpoint=$(CHAT)/$$stage; \
		if [ $$stage = base ]; then checkpoint=llama2/checkpoints/stdlib; fi; \
		$(BIN)/llama2 answer --checkpoint $$checkpoint --data $(HELD_OUT)/held_out.jsonl $(ASKED) \
			--out $(CHAT)/answers_$$stage.jsonl --summary $(CHAT)/results/answers_$$stage.json || exit 1; \
	done
	head -n 500 $(HELD_OUT)/ghost_held_out.jsonl > $(CHAT)/obeyed_held_out.jsonl
	$(BIN)/llama2 obedience --checkpoint $(CHAT)/sft --checkpoint $(CHAT)/chat \
		--data $(CHAT)/obeyed_held_out.jsonl --out $(CHAT)/obeyed.jsonl \
		--summary $(CHAT)/results/obedience.json $(ASKED)
	$(BIN)/python -m llama2.finetune.chat_card --checkpoint $(CHAT)/chat --results $(CHAT)/results

# One thread per test process: the processes share the cores, and the interpreter has one thread.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 tests

# What `make test` leaves out of the combinations of parameters, and its longest cases.
test-long: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 -m long tests

# Tests of error budgets under other seeds, instruction sets and numbers of threads: hours. What has
# been run is kept in .seeds/ and not run again for the same sources.
test-seeds: $(READY)
	$(BIN)/python tests/support/run_seeds.py

# Every combination in which Transformers' models are run, under the pinned version, the newest and
# the last 4.
MATRIX := pytest -n auto --maxprocesses 4 -m "" tests/hosts/test_transformers.py \
	tests/hosts/test_transformers_masks.py tests/hosts/test_patching.py tests/hosts/test_peer_failures.py \
	tests/hosts/test_linear_cross_entropy_patch.py tests/hosts/test_generate_batch.py

test-matrix: $(READY) .venv-transformers4/.ready .venv-transformers/.ready
	OMP_NUM_THREADS=1 $(BIN)/$(MATRIX)
	OMP_NUM_THREADS=1 .venv-transformers/bin/$(MATRIX)
	OMP_NUM_THREADS=1 .venv-transformers4/bin/$(MATRIX)

# The newest Transformers on the pinned PyTorch.
.venv-transformers/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-transformers
	.venv-transformers/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt \
		-e ".[models]" pytest pytest-xdist hypothesis
	.venv-transformers/bin/python -m pip install --disable-pip-version-check -q --upgrade transformers
	touch $@

# All tests on the newest versions of everything, which a CUDA build of PyTorch makes gigabytes.
test-newest: .venv-newest/.ready
	OMP_NUM_THREADS=1 .venv-newest/bin/pytest -n auto --maxprocesses 4 tests

.venv-newest/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --disable-pip-version-check -q -e ".[dev]"
	touch $@

.venv-transformers4/.ready: pyproject.toml constraints.txt constraints-transformers4.txt
	$(PYTHON) -m venv .venv-transformers4
	.venv-transformers4/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt \
		-e ".[models]" pytest pytest-xdist
	.venv-transformers4/bin/python -m pip install --disable-pip-version-check -q \
		-c constraints-transformers4.txt transformers
	touch $@

# Kernels broken on purpose, on the budgets and in the emulator: each has to be noticed.
test-mutants: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 -m mutants tests

# The kernels compiled for every target and their binaries read; then executed without a GPU: all
# dtypes, longer cases, every order, and approximate instructions that err as much as they may. Last,
# a report: which faults of a kernel are seen. More than an hour.
EMULATOR := PYTHONPATH=tests/support OMP_NUM_THREADS=1 $(BIN)/python -m ptx_emulator

test-machine-code: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 -m "" tests/machine_code \
		tests/ops/test_compile.py tests/ops/test_launch.py tests/ops/test_hopper_compile.py \
		tests/ops/test_dkdv_specialized.py
	$(EMULATOR).check --arch sm_80 --dtype float32 --dtype bfloat16 --noise
	$(EMULATOR).mutations --arch sm_80
	$(EMULATOR).mutations --arch sm_90

# The attention kernels for Hopper, which are off by default: random calls in random interleavings, a
# fault for each of their synchronisations, their binaries, and both for their PTX. Twenty minutes on
# one core; the faults in the PTX are listed for Triton 3.7.
test-hopper: $(READY)
	PYTHONPATH=tests/support OMP_NUM_THREADS=1 $(BIN)/python -m hopper_forward --cases 1000 --faults
	PYTHONPATH=tests/support OMP_NUM_THREADS=1 $(BIN)/python -m hopper_backward --cases 500 --faults
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "" tests/ops/test_hopper_compile.py \
		tests/ops/test_dkdv_specialized.py
	PYTHONPATH=tests/support OMP_NUM_THREADS=1 $(BIN)/python -m hopper_forward --ptx --cases 40 --faults
	PYTHONPATH=tests/support OMP_NUM_THREADS=1 $(BIN)/python -m hopper_backward --ptx --cases 20 --faults

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/pytest bench

# Other people's kernels, for the benchmarks to compare with. Those that are missing are skipped.
peers: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev,peers]"

# Triton 3.6.0 is what PyTorch 2.11 brings. Installed last and alone, because a CUDA build of the
# pinned PyTorch asks for its own Triton; nothing runs on a GPU, so that the two need not match.
compile-check-3.6: .venv-triton36/.ready
	OMP_NUM_THREADS=1 .venv-triton36/bin/pytest -m "" tests/ops/test_compile.py tests/ops/test_launch.py \
		tests/ops/test_hopper_compile.py tests/ops/test_dkdv_specialized.py

.venv-triton36/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-triton36
	.venv-triton36/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt \
		-e . pytest tqdm
	.venv-triton36/bin/python -m pip install --disable-pip-version-check -q --no-deps triton==3.6.0
	touch $@

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a few minutes; some GB, most of them PyTorch."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) .venv-triton36 .venv-transformers4 .venv-transformers .venv-newest .pytest_cache .ruff_cache .seeds
