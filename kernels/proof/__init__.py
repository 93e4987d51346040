"""A compiled kernel's proof at its first use: verdicts in a cache folder, and which backend is the faster one here."""
