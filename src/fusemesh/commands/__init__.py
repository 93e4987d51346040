"""The commands of ``fusemesh``."""
