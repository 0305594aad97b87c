"""Draw a face: a mask painter for the notebook, where its masks come from, and edits."""
