"""A tokenizer without a vocabulary: bytes are tokens. For models with random weights, in benchmarks and tests."""

from fastgen.tokenizer.base import SegmentedTokenizer
from fastgen.tokenizer.settings import Settings

BOS, EOS = 256, 257


class ByteTokenizer(SegmentedTokenizer):
    """Bytes are tokens 0 .. 255; 256 begins a text, 257 ends it."""

    def __init__(self) -> None:
        super().__init__(
            vocab_size=258,
            special={"<s>": BOS, "</s>": EOS},
            bos_id=BOS,
            eos_id=EOS,
            add_bos=True,
            adds_space=False,
            settings=Settings(),
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode())

    def _token_bytes(self, token: int) -> bytes:
        return bytes([token])
