"""Shared by all tests. Two runs of pytest make the suite (Makefile): interpreter tests, and everything else."""
