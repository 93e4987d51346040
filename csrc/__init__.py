"""The CPU engine: C++17 sources, and the shared library built from them at install time."""
