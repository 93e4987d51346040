"""Benchmarks: pytest suites, and scripts for GPUs and CPUs."""
