"""What makes training and sampling cheaper without changing what is computed."""
