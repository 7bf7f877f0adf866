# A byte-level model of Python code, trained on the standard library of this machine. In a minute on two cores it gets
# to 1.11 nats per byte; GPT-2's architecture with AdamW gets to 1.07 in ten. Nothing to download.
# $ python train.py config/train_pystdlib_fast.py

out_dir = "out-pystdlib-fast"
eval_interval = 100  # with a look at what it writes by then
eval_iters = 1  # the losses of evaluations are a glance; nanogpt eval measures them
log_interval = 20
dataset = "pystdlib"

# 16 rows * 256 bytes = 4,096 tokens per iteration; 500 iterations see 2.0M tokens, a sixth of an epoch
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256
max_iters = 500
context_warmup = 0.75  # half of the iterations see 64 rows of 64 bytes, a quarter 32 of 128: saves a seventh of the time

# 0.71M parameters
architecture = "qwen3"  # rotary positions, normalised queries and keys, SwiGLU
n_layer = 3
n_head = 4
n_embd = 128
tied_head = False
zero_init = True

optimizer = "muon"  # sets rates and schedule as well: they follow from width and length
lr_decay_iters = max_iters
