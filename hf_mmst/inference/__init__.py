"""Inference with the heads of the stages: early exit, ensembles of heads, truncated models.

In: a trained model and its `Stages`. Out: logits with the stage at which each sample left, or a smaller plain model.
May import: `records`, `method`, `cut`.
"""
