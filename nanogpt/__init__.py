"""nanoGPT: train, finetune, evaluate, sample and ship GPT-style language models."""

__version__ = "0.1.0"
