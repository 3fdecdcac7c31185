import torch

# The tensors here are small: more threads wait for each other, and sums depend on how many there are.
torch.set_num_threads(1)
