"""nanoGPT: train, finetune, evaluate, sample and ship GPT-style language models."""

__version__ = "2.0.0"
