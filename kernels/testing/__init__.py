"""Tools for testing kernels: error budgets, poisoned memory, a right interpreter."""
