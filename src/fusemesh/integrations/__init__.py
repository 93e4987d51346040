"""Doors: FuseMesh's attention behind the signatures of other libraries. Each module is imported by its own name."""
