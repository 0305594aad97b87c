"""What is around the training step: the run, its log, checkpoints, averages, drawn faces."""
