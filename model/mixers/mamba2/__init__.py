"""Mamba-2 (arXiv 2405.21060): `layer.py` is what trains, `mixer.py` what the rest of the code asks about it."""
