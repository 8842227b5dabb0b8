"""Checkpoints, states and settings on the disk, checked before anything is built of them."""
