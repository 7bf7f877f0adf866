"""Time the training step: `python bench.py [--key=value …]`, settings by `--help`."""

from nanogpt.cli import run

if __name__ == "__main__":
    run("bench")
