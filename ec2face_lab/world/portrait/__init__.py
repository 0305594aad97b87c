"""The second miniature's world: procedural portraits, made for 128 px, of any size."""
