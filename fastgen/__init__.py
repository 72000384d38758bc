"""LLaMA-family generation: the chain from checkpoint to text. README.md gives the reading order."""
