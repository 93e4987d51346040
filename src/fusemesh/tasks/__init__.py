"""Tasks, one module each: a task holds the data, the kind of model and the metric of one use; see base.py."""
