# A small character-level model of Shakespeare: minutes on a GPU, a good first run anywhere.
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char.py

out_dir = "out-shakespeare-char"
eval_interval = 250  # often, since a data set this small is soon learned by heart
eval_iters = 200
log_interval = 10

# past the best point the validation loss rises: keep the checkpoints from before it
always_save_checkpoint = False

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

# 64 rows * 256 characters = 16,384 tokens per iteration; 5,000 iterations are 82 epochs over 1.0M characters
dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

# 10.65M parameters
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # many epochs need it

learning_rate = 1e-3  # small networks bear higher rates
max_iters = 5000
lr_decay_iters = max_iters
min_lr = learning_rate / 10
beta2 = 0.99  # slower decay of the second moment, since a batch holds few tokens
warmup_iters = 100
