"""Checkpoint formats, one file each; all give the same `Checkpoint`."""
