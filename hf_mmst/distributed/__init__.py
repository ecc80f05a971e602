"""Several processes, and what wraps the model: DDP, FSDP2, DeepSpeed, `torch.compile`, stages on several devices.

In: a cut model and its process group. Out: the same training step with gradients reduced, or activations sent on.
Imports: `method`, `cut`, `config`.
"""
