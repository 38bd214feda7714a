"""Models behind one interface: base.py says what tasks may ask; loading.py opens a folder."""
