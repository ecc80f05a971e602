"""Several processes: data parallelism (DDP, FSDP2, DeepSpeed), stage parallelism, and `torch.compile` by layers.

In: a model that is cut, and its processes. Out: the gradients of a stage averaged over them, or its activations sent on
to the next of them; an error where a wrapper cannot train stages. May import: `method`, `cut`, `config`.
"""
