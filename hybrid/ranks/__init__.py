"""Ranks: how processes are started, find each other, and watch each other."""
