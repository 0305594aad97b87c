"""Options that make training and sampling cheaper; all are off by default."""
