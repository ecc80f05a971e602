"""Two tasks from names to results: image classification and text classification.

In: names of a dataset and of a model. Out: a ready trainer, a table of its stages, `results.json`.
May import: `trainer`, `records`, `memory`, `cut`, `config`, `field_checks`.
"""
