# A byte-level model of Python code, trained on the standard library of this machine: nothing to download.
# $ python train.py config/train_pystdlib.py

out_dir = "out-pystdlib"
eval_interval = 200
eval_iters = 20
log_interval = 10

dataset = "pystdlib"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128
bias = False

learning_rate = 4e-3
max_iters = 1000
lr_decay_iters = max_iters
min_lr = learning_rate / 20
beta2 = 0.99
warmup_iters = 50
