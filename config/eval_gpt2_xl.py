# The loss of OpenAI's gpt2-xl (1558M parameters) on OpenWebText.
# $ python train.py config/eval_gpt2_xl.py

init_from = "gpt2-xl"
eval_only = True
eval_iters = 500  # many batches: a good estimate is all this is for
batch_size = 8
