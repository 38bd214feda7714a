"""Small models that are compared as the paper compares large ones; docs/experiments.md has the protocol and commands.

scales.py       sizes, data and budgets of a comparison
models.py       the models as a table, fitted to one number of parameters
configs.py      a run's YAML file
layout.py       where things lie in an experiment's folder
jobs.py         commands that train, tune and measure
experiments.py  which jobs an experiment has
runner.py       starts jobs on GPUs, and stops in time
results.py      what the folders hold
tables.py       the same as Markdown
plots.py        the same as pictures
prepare.py      text to a tokenizer and token shards
reading.py      memory and speed of reading texts of several lengths
"""
