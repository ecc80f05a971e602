"""Files that a run writes and reads back: checkpoints, stages, results, model cards, plots.

In: tensors and plain data. Out: safetensors, JSON, Markdown and PNG files, written whole or not at all; errors that
name a damaged file. May import: `method`, `cut`, `config`.
"""
