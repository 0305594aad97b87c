"""The miniature: procedural faces, and the small networks that are trained on them."""
