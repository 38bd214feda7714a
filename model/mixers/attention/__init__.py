"""Attention over a window or everything before: see `mixer.py`, and `layer.py` for what trains."""
