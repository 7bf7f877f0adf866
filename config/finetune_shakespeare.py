# Finetune GPT-2 on Shakespeare.
# $ python data/shakespeare/prepare.py
# $ python train.py config/finetune_shakespeare.py

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40

wandb_project = "shakespeare"
wandb_run_name = "finetune"

dataset = "shakespeare"
init_from = "gpt2-xl"  # the largest; gpt2, gpt2-medium or gpt2-large where memory is short

# a model this large learns a text this small by heart within an epoch or two: keep the checkpoints from before it
always_save_checkpoint = False

# 1 row * 1,024 tokens * 32 micro-batches = 32,768 tokens per iteration; 301,966 tokens are 9.2 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# small steps, all alike; right for OpenAI's models, which are large and well trained. Smaller ones need larger steps:
# one of 11M parameters, trained on novels, learned nothing to speak of at this rate, and much at 1e-3 (docs/LOG.md)
learning_rate = 3e-5
decay_lr = False
