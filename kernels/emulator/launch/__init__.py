"""Launches of Triton, bound to memory and run, and what they are counted to have done."""
