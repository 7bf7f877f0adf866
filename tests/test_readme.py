"""The commands of the README and of docs/guide.md, executed in their order in a copy of the repository."""

import re
import shlex
import shutil
import signal
import subprocess
import textwrap
import urllib.request
from pathlib import Path

import pytest

from tests.programs import ROOT, Started
from tests.test_huggingface import write_gpt2

PAGES = ["README.md", "docs/guide.md"]
BLOCKS = [
    block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
]
COMMANDS = list(dict.fromkeys(line for block in BLOCKS for line in block.strip().splitlines()))

# what is added to a command so that it ends in seconds; the words of the README stay in front
SHORT = "--max_iters=2 --eval_iters=1 --plot=False"
SMALL = "--n_layer=1 --n_head=2 --n_embd=16 --batch_size=2 --block_size=16"
SHRUNK = {
    "python train.py config/train_pystdlib": SHORT,
    "python train.py config/chat_pydoc.py": f"{SHORT} --batch_size=2",
    "nanogpt eval out-chat-pydoc": "--limit=20",
    "python train.py config/train_shakespeare_char.py": f"{SHORT} {SMALL}",
    "python train.py config/train_shakespeare_char.py --device=cpu": SHORT,
    "python train.py config/train_shakespeare_char_fast.py": SHORT,
    "python train.py config/train_own_text.py": SHORT,
    "nanogpt train": SHORT,
    "python train.py config/train_gpt2.py": "--dry_run",
    "torchrun --standalone --nproc_per_node=2": SHORT,
    "python data/openwebtext/prepare.py": "--input=data/shakespeare_char/input.txt --val_fraction=0.1",
    "python train.py config/eval_gpt2": "--dry_run",
    "python train.py config/finetune_shakespeare.py": f"{SHORT} --block_size=16",
    "torchrun --standalone --nproc_per_node=8": f"{SHORT} {SMALL} --dataset=pystdlib --device=cpu --wandb_log=False",
    "python sample.py": "--num_samples=2 --max_new_tokens=10",
    "nanogpt eval --init_from=shakespeare-hf": "--batch_size=256",
    "python bench.py": f"{SMALL} --steps=2 --warmup_steps=1",
}
# what sets up the environment that this test already runs in, or is this test
NOT_HERE = ("make ", "pip install", "python -m venv", ". .venv", "ruff ", "mypy", "pytest")


def test_the_commands_run_as_written(downloads: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    write_gpt2(mirror / "openai-community" / "gpt2-xl")  # tiny and random, under the name of the large one
    shutil.copy(downloads / "tinyshakespeare.txt", mirror)
    repository = tmp_path / "repository"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repository / name)
    programs = {"python": [], "nanogpt": ["-m", "nanogpt"], "torchrun": ["-m", "torch.distributed.run"]}
    environment = {"PYTHONPATH": ".", "NANOGPT_DOWNLOADS": str(mirror)}
    executed = 0
    for command in [command for command in COMMANDS if not command.startswith(NOT_HERE)]:
        if command.startswith("echo "):
            subprocess.run(command, shell=True, cwd=repository, check=True)
            continue
        extra = [SHRUNK[start] for start in sorted(SHRUNK, key=len) if command.startswith(start)][-1:]
        words = shlex.split(" ".join([command, *extra]).replace("--nproc_per_node=8", "--nproc_per_node=2"))
        if "serve" in words:
            try_server([*programs[words[0]], *words[1:], "--port=0"], repository, environment)
            continue
        result = Started([*programs[words[0]], *words[1:]], repository, **environment).wait()
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        executed += 1
    assert executed >= 20


def try_server(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Start it, see that it is well, and end it as Ctrl-C does."""
    started = Started(words, folder, **environment)
    started.wait_for("API at /v1")
    [address] = re.findall(r"page at (\S+),", started.written(0))
    with urllib.request.urlopen(f"{address}/health", timeout=30) as answer:
        assert answer.status == 200
    started.send(signal.SIGINT)
    assert started.wait().returncode == 0


def test_the_loop_that_is_shown_is_that_of_the_program() -> None:
    [shown] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    program = re.sub(r"  # type: ignore.*", "", (ROOT / "nanogpt" / "train.py").read_text("utf-8"))
    assert textwrap.indent(shown, " " * 16) in program


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]+)\b", "\n".join(COMMANDS)))
    assert named >= {"demo", "test"}
    assert named <= targets


@pytest.mark.parametrize("page", [path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))])
def test_every_link_leads_somewhere(page: Path) -> None:
    for path in re.findall(r"\]\(([^)#:\s]+)\)", (ROOT / page).read_text("utf-8")):
        assert (ROOT / page.parent / path).exists(), path
