"""Device memory: which layers are in it, where the others rest meanwhile, cached features, and measured peaks.

In: a model that is cut, and its optimizer. Out: layers that come to the device when they run and leave it afterwards,
inputs of a stage that are computed once, peaks in bytes. May import: `records`, `method`, `cut`.
"""
