"""Small vocabularies for the tokenizer tests, trained in a fraction of a second, and the formats to store them in.

Each writer follows the tool that writes the format in the wild: transformers' conversion to tokenizer.json, llama2.c's
`export`, llama.cpp's conversion to GGUF.
"""

import io
import json
import random
import struct
from collections.abc import Callable
from functools import cache

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = (
    *("the", "café", "naïve", "déjà-vu", "北京", "привет", "12", "3456", "don't", "we'll", "Once", "upon", "a", "time"),
    *("x+=1;", "<tag>", "🙂", "👩\u200d👩\u200d👧", "", "über\n\nself.x\t="),
)
CORPUS = [" ".join(random.Random(seed).choices(WORDS, k=20)) for seed in range(200)]


@cache
def small_sentencepiece() -> bytes:
    """A SentencePiece model in the manner of Llama 2's: 420 pieces, `[INST]` user-defined, `<|im_end|>` control."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98,
        user_defined_symbols=["[INST]"], control_symbols=["<|im_end|>"], minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


@cache
def small_byte_level() -> str:
    """A byte-level BPE's tokenizer.json that splits as SmolLM2's does: 400 tokens and `<think>`, not a special one."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(CORPUS, trainer)
    model.add_tokens(["<think>"])
    return model.to_str()


def sentencepiece_as_json(spm: sentencepiece.SentencePieceProcessor) -> str:
    """The model as transformers converts it: every split of a piece into two pieces is a merge."""
    vocabulary = {spm.id_to_piece(token): token for token in range(len(spm))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, token in vocabulary.items()
        if not (spm.is_byte(token) or spm.is_control(token))
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    model = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ("<unk>", "<s>", "</s>", "<|im_end|>")
    model.add_special_tokens([tokenizers.AddedToken(text, normalized=True) for text in special])
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return model.to_str()


def sentencepiece_as_llama2c(spm: sentencepiece.SentencePieceProcessor, spell_byte: Callable[[int], bytes]) -> bytes:
    """The model as llama2.c exports it, with the ids of the bytes moved to follow the first three as there."""
    others = range(3, len(spm))
    order = [0, 1, 2, *filter(spm.is_byte, others), *(token for token in others if not spm.is_byte(token))]
    entries = []
    for token in order:
        piece = {1: "\n<s>\n", 2: "\n</s>\n"}.get(token) or spm.id_to_piece(token).replace("▁", " ")
        data = spell_byte(int(piece[3:5], 16)) if spm.is_byte(token) else piece.encode()
        entries.append(struct.pack("<fi", spm.get_score(token), len(data)) + data)
    return struct.pack("<i", max(map(len, entries)) - 8) + b"".join(entries)


def sentencepiece_as_gguf(spm: sentencepiece.SentencePieceProcessor) -> dict[str, object]:
    """The model's metadata in a GGUF file."""
    ids = range(len(spm))
    kinds = [2 if spm.is_unknown(t) else 3 if spm.is_control(t) else 6 if spm.is_byte(t) else 1 for t in ids]
    kinds[spm.piece_to_id("[INST]")] = 4
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [spm.id_to_piece(token) for token in ids],
        "tokenizer.ggml.scores": [spm.get_score(token) for token in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ bos_token }}",
    }


def byte_level_as_gguf(content: str, pre: str) -> dict[str, object]:
    """A byte-level tokenizer.json's metadata in a GGUF file."""
    model = tokenizers.Tokenizer.from_str(content)
    added = model.get_added_tokens_decoder()
    ids = range(model.get_vocab_size())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [model.id_to_token(token) for token in ids],
        "tokenizer.ggml.token_type": [(3 if added[t].special else 4) if t in added else 1 for t in ids],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(content)["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
