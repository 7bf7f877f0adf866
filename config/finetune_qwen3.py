# Finetune Qwen3 (0.6B parameters) on your own text; any Llama or Qwen3 folder works in its place.
# $ nanogpt prepare mytext --input=PATH --tokenizer=Qwen/Qwen3-0.6B-Base
# $ python train.py config/finetune_qwen3.py
# An own folder: --tokenizer=FOLDER above, --init_from=FOLDER below.

out_dir = "out-qwen3"
eval_interval = 20
eval_iters = 40

# a model this large soon knows a small text by heart: keep the checkpoints from before that
always_save_checkpoint = False

wandb_project = "mytext"
wandb_run_name = "qwen3"

init_from = "Qwen/Qwen3-0.6B-Base"
dataset = "mytext"
sampling = "epoch"  # all of the text, again and again
mask_documents = True  # a token sees its own document only
block_size = 1024  # the model would take 32,768

# 2 rows * 1,024 tokens * 16 micro-batches = 32,768 tokens per iteration; 200 iterations see 6.5M
batch_size = 2
gradient_accumulation_steps = 16
gradient_checkpointing = True  # fits into 16 GB
max_iters = 200

# short steps, after a short warm-up, to the end
learning_rate = 2e-5
warmup_iters = 10
lr_decay_iters = max_iters
min_lr = learning_rate / 10
weight_decay = 0.0  # what was learned before shall stay
