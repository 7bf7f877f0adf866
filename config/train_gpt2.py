# GPT-2 (124M) on OpenWebText, as in the GPT-2 paper's smallest model.
# data/openwebtext must hold train.bin and val.bin: GPT-2 tokens as uint16, as the original nanoGPT prepares them.
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 rows * 1,024 tokens * 40 micro-batches = 491,520 tokens per iteration, about GPT-2's half million
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8  # 5 on each of 8 GPUs

# 600,000 iterations * 491,520 tokens = 295B tokens
max_iters = 600_000
lr_decay_iters = max_iters

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
