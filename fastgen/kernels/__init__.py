"""The five stages of the transformer block: `reference` defines them, the other files make them fast."""
