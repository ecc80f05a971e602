"""Planning: the memory and compute of ways of training, found before a run, and the settings that fit a budget.

In: a model or its name, a batch or its size, a budget in bytes. Out: a `Plan`. Steps are simulated on fake tensors, so
that nothing is allocated. May import: `memory`, `records`, `method`, `cut`, `config`, `field_checks`.
"""
