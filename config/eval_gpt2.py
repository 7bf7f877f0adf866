# The loss of OpenAI's gpt2 (124M parameters) on OpenWebText.
# $ python train.py config/eval_gpt2.py

init_from = "gpt2"
eval_only = True
eval_iters = 500  # many batches: a good estimate is all this is for
batch_size = 8
