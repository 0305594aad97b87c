"""From raw downloads to verified data roots and weights."""
