"""What is in device memory, and what rests in host memory or on disk meanwhile.

In: a model, its layers, an optimizer. Out: layers that come to the device when they run, features of frozen stages
that are computed once, and the most memory that was held. Imports: `records`, `cut`, `method`.
"""
