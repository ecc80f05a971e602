"""What a training run takes, before it runs: bytes on the device, compute, and the settings that fit a budget.

In: a model's config, a batch, a budget. Out: a `Plan`, found by a simulation on tensors without data.
Imports: `memory`, `method`, `cut`, `config`.
"""
