"""Where a model can be cut: its layers, the stages made of them, and what crosses their ends.

In: a model, the names of its layers, example inputs. Out: a `Partition`, what each layer costs and returns, the task's
loss, or an error that says why the model cannot be cut. Nothing here trains. Imports: nothing of the package.
"""
