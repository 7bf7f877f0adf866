"""Generate text with a trained model: `python sample.py --out_dir=out`, settings by `--help`."""

from nanogpt.cli import run

if __name__ == "__main__":
    run("sample")
