"""Every kernel, compiled for a GPU that is absent, run by the emulator and held to the error budget."""
