"""`MMSTTrainer`: Hugging Face's `Trainer`, with each training step run stage by stage.

In: what `Trainer` takes, with an `MMSTConfig`. Out: a trained model, its heads, checkpoints, metrics of each stage.
`mmst_trainer.py` lists each overridden method; the other files do the work. Imports: all rooms above but `inference`.
"""
