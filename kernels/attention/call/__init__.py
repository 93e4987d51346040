"""The contract of a call of attention: its options, checks and normal form, which every backend takes."""
