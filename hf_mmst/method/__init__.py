"""The method: auxiliary heads, local losses, the transport term, the order of stages, optimizer steps by stage.

In: a model, a `Partition`, a batch. Out: gradients of each stage that learns, its loss and its transport.
Neither Hugging Face's trainer nor several processes are known here. May import: `cut`.
"""
