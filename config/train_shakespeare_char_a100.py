# Shakespeare by characters on two cores, towards the loss that train_shakespeare_char.py reaches on an A100.
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_a100.py

out_dir = "out-shakespeare-char-a100"
eval_iters = 1
log_interval = 20
dataset = "shakespeare_char"

# 16 rows * 256 characters = 4,096 tokens per iteration; 500 iterations make two epochs; with
# more it learns the text by heart
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256
max_iters = 500
eval_interval = max_iters

# 3.3M parameters; dropout would cost more time than it gives
architecture = "qwen3"
n_layer = 4
compile = True  # the blocks: 12 seconds that come back
n_head = 4
n_embd = 256
tied_head = False
zero_init = True

optimizer = "muon"  # sets rates and schedule as well: they follow from width and length
lr_decay_iters = max_iters
