# A small model on your own text, some minutes on two CPU cores.
# $ nanogpt prepare mytext --input=PATH --tokenizer=bpe:1024
# $ python train.py config/train_own_text.py
# With a GPU: --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64 --max_iters=5000

out_dir = "out-mytext"
eval_interval = 250
eval_iters = 40
log_interval = 10

# a small text is soon known by heart: keep the checkpoints from before that
always_save_checkpoint = False

wandb_project = "mytext"
wandb_run_name = "small"

dataset = "mytext"
sampling = "epoch"  # all of the text, again and again
# 16 rows * 128 tokens = 2,048 tokens per iteration; 2,000 iterations see 4M
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.1  # a small text is read several times

learning_rate = 3e-3  # small networks bear high rates
max_iters = 2000
lr_decay_iters = max_iters
min_lr = learning_rate / 10
beta2 = 0.99  # slower decay of the second moment, since a batch holds few tokens
warmup_iters = 100
