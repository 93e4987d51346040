"""What on_gpu.py runs: cases, stages, dry runs."""
