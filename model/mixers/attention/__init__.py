"""Attention over a window or everything before: `layer.py` is what trains, `mixer.py` what the rest of the code asks about it."""
