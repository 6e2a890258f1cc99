"""How the authors' scorer cleans a text before it is compared; both sides of a pair go through it.

It is VQA-style punctuation removal, quirks included: whether a mark is deleted or becomes a space depends on the
whole text, and at most 32 full stops are removed. The quirks are kept because published numbers contain them.
Source: the public inference code of arXiv 2408.12867 (McCartney01/SAM).
"""

import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# The authors pass the flag re.UNICODE in the place of re.sub's `count`: its value is the limit.
_MAX_FULL_STOPS = int(re.UNICODE)


def clean(text: str) -> str:
    """Return `text` as it is compared: one line, no punctuation, lower case."""
    original = text.replace("\n", " ").replace("\t", " ").strip()
    has_number = _COMMA_IN_NUMBER.search(original) is not None
    cleaned = original
    for mark in PUNCTUATION:
        at_a_word_border = f"{mark} " in original or f" {mark}" in original
        cleaned = cleaned.replace(mark, "" if at_a_word_border or has_number else " ")
    cleaned = _FULL_STOP.sub("", cleaned, count=_MAX_FULL_STOPS)
    return cleaned.strip("'").strip('"').strip().lower()


def has_words(cleaned: str) -> bool:
    """False for a text of nothing but full stops: the `rouge` package refuses such a hypothesis; it counts as empty."""
    return bool(cleaned.replace(".", "").strip())
