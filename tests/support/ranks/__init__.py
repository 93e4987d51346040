"""What ranks run in distributed tests; ranks import it by its full name."""
