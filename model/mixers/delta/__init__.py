"""Gated DeltaNet and Kimi Delta Attention: `layer.py` is what trains, `mixer.py` what the rest of the code asks."""
