"""Draw a face: a mask painter for the notebook, and where its masks come from."""
