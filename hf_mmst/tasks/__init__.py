"""Two tasks from names to results: the classification of images and of texts.

In: names of a dataset and of a model. Out: a ready trainer, a table of its stages, `results.json`.
Imports: `trainer`, `planning`, `records`, `memory`, `config`.
"""
