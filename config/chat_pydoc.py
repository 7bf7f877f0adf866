# Teach a model to answer: finetune it on questions and answers about the Python library of this machine.
# $ python train.py config/train_pystdlib_fast.py        # a model of your own, in two minutes
# $ python train.py config/chat_pydoc.py --init_from=out-pystdlib-fast
# $ nanogpt chat out-chat-pydoc
# Any other model that can be opened works in its place; of a large one, train low-rank adapters only:
# $ python train.py config/chat_pydoc.py --init_from=Qwen/Qwen3-0.6B --lora_rank=16 --learning_rate=1e-3

out_dir = "out-chat-pydoc"
eval_interval = 100
eval_iters = 10
log_interval = 20
always_save_checkpoint = False

wandb_project = "pydoc"
wandb_run_name = "chat"

dataset = "pydoc"  # prepared at the first run, with the tokenizer of the model
block_size = 256  # rows hold whole conversations, as many as fit

# 16 rows * 256 tokens = 4,096 tokens per iteration, of which a third are answers, which alone count in the loss
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 600

learning_rate = 3e-3  # for less than a million parameters; 1e-3 for adapters, 2e-5 for all weights of a large model
warmup_iters = 20
lr_decay_iters = max_iters
min_lr = learning_rate / 10
weight_decay = 0.0  # what was learned before shall stay
