"""What is measured: a file for each task, and registry.py with their names."""
