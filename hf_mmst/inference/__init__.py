"""What the heads of the stages are good for after training: early exits, ensembles, smaller models.

In: a checkpoint with its stages. Out: logits and the layer at which each sample left, or a plain truncated model.
Imports: `records`, `method`, `cut`.
"""
