"""What a stage learns from, and when: heads, local losses, transport, the order of the stages, their optimizer step.

In: a model, a `Partition`, a batch. Out: gradients of each stage, and numbers of its loss and transport.
Imports: `cut`.
"""
