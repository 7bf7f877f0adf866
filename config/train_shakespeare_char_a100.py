# Shakespeare by characters on two cores, to the loss that train_shakespeare_char.py reaches on an A100, in 5 minutes.
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_a100.py

out_dir = "out-shakespeare-char-a100"
eval_iters = 1
log_interval = 20
dataset = "shakespeare_char"

# 16 rows * 256 characters = 4,096 tokens per iteration; 1,250 iterations make five epochs
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256
max_iters = 1250
eval_interval = max_iters

# 3.3M parameters
architecture = "qwen3"
n_layer = 4
compile = True  # the blocks: 12 seconds that come back
n_head = 4
n_embd = 256
dropout = 0.1
tied_head = False
zero_init = True

optimizer = "muon"  # sets rates and schedule as well: they follow from width and length
lr_decay_iters = max_iters
weight_decay = 0.3  # with dropout the difference between learning the text and learning it by heart
