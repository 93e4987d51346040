"""What cpu_engine.py compares the engine with, and the ceilings of the machine."""
