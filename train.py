"""Train a GPT: `python train.py [config/file.py …] [--key=value …]`, settings by `--help`."""

from nanogpt.cli import run

if __name__ == "__main__":
    run("train")
