"""The command `hf-mmst` and what the recipes share with it: flags, YAML files, exit codes.

In: a command line. Out: a plan, a training run, an evaluation, a card; errors in one line on stderr.
Imports: everything below it.
"""
