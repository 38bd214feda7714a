"""The SwiGLU MLP: `layer.py` is what trains, `mixer.py` what the rest of the code asks about it."""
