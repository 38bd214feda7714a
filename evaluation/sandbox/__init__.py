"""Programs that a model wrote, run where they can do no harm: run.py starts them, inside.py is what they run in."""
