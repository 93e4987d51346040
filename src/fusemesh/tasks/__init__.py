"""What a model is trained for: data, loss and metric of each task, one file a task."""
