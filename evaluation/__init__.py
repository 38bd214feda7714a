"""Measures of models: `sambalm evaluate`, and the section `evaluation` of a run.

models/       a model behind one small interface, Samba or any causal language model that transformers loads
tasks/        what is measured; none of them knows a model
harness/      lm-evaluation-harness, both ways
sandbox/      programs that a model wrote, run where they can only compute
task.py       what a task says of itself: items, how they are measured, how records become scores
settings.py   the keys of tasks, as values and overrides
data.py       documents as tokens: shards, text files, or the held-out part of a run
records.py    the records of items that are done, from which an evaluation goes on
runner.py     tasks to results: read this first
ranks.py      the processes that measure together
in_loop.py    the hook that measures a model while it trains
command.py    from a path and names of tasks to printed tables
results.py    results as JSON and tables
plots.py      lines and heat maps
"""
