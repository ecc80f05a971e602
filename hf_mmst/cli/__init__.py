"""The command `hf-mmst`, and what the recipes share with it: flags, YAML files, exit codes.

In: a command line. Out: a plan, trials, a training run, an evaluation or a model card; errors in one line on stderr.
May import: every other room.
"""
