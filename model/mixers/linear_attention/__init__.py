"""Gated linear attention and retention: `layer.py` is what trains, `mixer.py` what the rest of the code asks."""
