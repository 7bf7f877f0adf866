# The shape of GPT-2 (124M) with what has been learned since: rotary positions, normalised queries and keys, SwiGLU,
# Muon. Tried for stability only (50 steps, docs/LOG.md); what it reaches on OpenWebText has not been measured.
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py
# On one GPU the same run: python train.py config/train_gpt2_fast.py, eight times as long.

out_dir = "out-gpt2-fast"
wandb_project = "owt"
wandb_run_name = "gpt2-124M-fast"

# 16 rows * 1,024 tokens * 32 micro-batches = 524,288 tokens per iteration; 6,000 iterations make 3.1B tokens
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 4 * 8  # 4 on each of 8 GPUs
max_iters = 6000
lr_decay_iters = max_iters

eval_interval = 250
eval_iters = 100
log_interval = 10

architecture = "qwen3"
tied_head = False
zero_init = True

optimizer = "muon"  # sets rates and schedule as well; what follows differs from that
decay_share = 0.5
warmup_iters = 100
