"""Mega-S6 (arXiv 2406.07522, 2209.10655): `layer.py` is what trains, `mixer.py` what the rest of the code asks."""
