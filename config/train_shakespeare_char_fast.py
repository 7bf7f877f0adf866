# Shakespeare by characters in seconds on two cores: as good as the 2,000 steps of train_shakespeare_char.py on a CPU
# (README), at the same context of 64. How it was found: docs/LOG.md.
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_fast.py

out_dir = "out-shakespeare-char-fast"
eval_iters = 1  # the loss that it prints at the end is a glance; nanogpt eval measures it
log_interval = 20
sample_interval = 0  # looking at it and drawing it would take a second of five
plot = False
dataset = "shakespeare_char"

# 24 rows * 64 characters = 1,536 tokens per iteration; 165 iterations make 253,440, a quarter of the text
gradient_accumulation_steps = 1
batch_size = 24
block_size = 64
max_iters = 165
eval_interval = max_iters

# 0.23M parameters: in so few steps one wide block learns more than several
architecture = "qwen3"  # rotary positions and normalised queries and keys: worth half of the steps
n_layer = 1
n_head = 4
n_embd = 128
tied_head = False  # a head of its own
zero_init = True

optimizer = "muon"  # sets rates and schedule as well: they follow from width and length
lr_decay_iters = max_iters
muon_lr = 0.03
