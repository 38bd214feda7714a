"""Whole pipelines for datatrove, each a program: `python -m sambalm.data_pipeline.recipes.web --help`."""
