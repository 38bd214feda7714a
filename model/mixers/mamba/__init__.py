"""Mamba-1 (arXiv 2312.00752): `layer.py` is what trains, `mixer.py` what the rest of the code asks about it."""
