"""What is written to disk and read back: stages, results, model cards, pictures, the folders of checkpoints.

In: plain data and tensors. Out: JSON, safetensors, Markdown and PNG files that are whole or absent; errors that name a
damaged file. Imports: `method`, `cut`, `config`.
"""
