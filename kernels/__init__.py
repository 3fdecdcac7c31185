"""Operators of RWKV training, each with its reference and its gradient. They import torch alone."""
