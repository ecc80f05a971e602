"""Cutting a model into stages: its layers, where stages can end, what passes from one to the next, the task's loss.

In: a model, example inputs. Out: a `Partition` of the layers' names, the cost and output of each layer, an `Objective`,
or an error that says why the model cannot be cut. Nothing here trains. May import: nothing of the package.
"""
