"""Tokenizers: one interface (`base`), one file a format, `open` tells them apart by content."""
