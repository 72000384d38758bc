"""Whether two models speak of the same tokens: what a draft needs of its target."""

from fastgen.errors import UsageError
from fastgen.load import LoadedModel


def require_same_vocabulary(target: LoadedModel, draft: LoadedModel) -> None:
    """Raise `UsageError`, with the first difference, unless every token id stands for the same bytes in both.

    Vocabularies are compared by content: names and files may differ.
    """
    ours, theirs = target.tokenizer, draft.tokenizer
    if ours is theirs:
        return
    named = [{token: text for text, token in words.special.items()} for words in (ours, theirs)]
    for token in range(max(ours.vocab_size, theirs.vocab_size)):
        found = [
            "nothing" if token >= words.vocab_size else repr(texts.get(token) or words.token_bytes(token))
            for words, texts in zip((ours, theirs), named, strict=True)
        ]
        if found[0] != found[1]:
            raise UsageError(
                f"--draft {draft.checkpoint.path}: its vocabulary is another: token {token} is {found[1]} there, "
                f"{found[0]} in the model\nA draft must have been made for the model that it drafts for"
            )
