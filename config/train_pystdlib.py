# A byte-level model of Python code, trained on the standard library of this machine: nothing to download.
# $ python train.py config/train_pystdlib.py

out_dir = "out-pystdlib"
eval_interval = 150
eval_iters = 20
log_interval = 10

dataset = "pystdlib"
# 32 rows * 64 bytes = 2,048 tokens per iteration; 900 iterations see 1.8M tokens, a sixth of an epoch
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64

# 0.82M parameters
n_layer = 4
n_head = 4
n_embd = 128
bias = False

learning_rate = 4e-3  # small networks bear high rates, and there is little time
max_iters = 900  # 45 seconds on two cores
lr_decay_iters = max_iters
min_lr = learning_rate / 20
beta2 = 0.99  # slower decay of the second moment, since a batch holds few tokens
warmup_iters = 50
