"""How Triton kernels start: the one function that launches them, the interpreter's repairs, recorded launches."""
