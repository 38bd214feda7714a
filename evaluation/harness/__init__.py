"""lm-evaluation-harness: its tasks on our models, and our tasks on long texts for its models.

model.py        any model of this package as one of lm-eval's
long_texts.py   our tasks on long texts as data of lm-eval's, which the YAML files beside it name
"""
