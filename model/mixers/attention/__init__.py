"""Sliding-window attention: `layer.py` is what trains, `mixer.py` what the rest of the code asks about it."""
