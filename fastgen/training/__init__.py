"""Training: token data, objectives, the loop, and what a run leaves on disk."""
