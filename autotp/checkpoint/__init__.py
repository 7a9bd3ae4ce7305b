"""Checkpoints: read only what a rank needs, write what anyone can read."""
