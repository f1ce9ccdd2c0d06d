"""Word lists filtered by a tokenizer: words of one token, and words of equal length in tokens.

A word is tokenised as it occurs in a sentence, after a space. Words that the tokenizer cannot write
(they contain its unknown token) are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from tl_edgeprune.tasks.tokens import answers_in_context

SENTENCE = "Then they talked about the"


def single_tokens(
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[str],
    needed: int,
    what: str,
    prompt: str = SENTENCE,
) -> dict[str, int]:
    """The words that are one token after a prompt and a space, with that token.

    Raises:
        ValueError: fewer than `needed`; the message calls them `what` and lists the split words.
    """
    tokens = pieces(tokenizer, words, prompt)
    single = {word: ids[0] for word, ids in tokens.items() if len(ids) == 1}
    if len(single) < needed:
        split = ", ".join(word for word in words if word not in single)
        raise ValueError(
            f"{what} of one token each: {needed} are needed, and this tokenizer has {len(single)}; "
            f"it splits {split}."
        )
    return single


def pieces(
    tokenizer: PreTrainedTokenizerBase, words: Iterable[str], prompt: str = SENTENCE
) -> dict[str, list[int]]:
    """Each word's tokens after a prompt and a space; without words that have an unknown token."""
    tokens = answers_in_context(tokenizer, prompt, (f" {word}" for word in words))
    return {answer[1:]: ids for answer, ids in tokens.items()}


def by_length(
    tokenizer: PreTrainedTokenizerBase, words: Iterable[str], prompt: str = SENTENCE
) -> dict[int, list[str]]:
    """Words by their number of tokens after a prompt and a space, in the given order."""
    groups = defaultdict(list)
    for word, ids in pieces(tokenizer, words, prompt).items():
        groups[len(ids)].append(word)
    return dict(groups)


def same_length(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], needed: int, what: str
) -> list[str]:
    """The largest group of words with equal numbers of tokens, which can replace each other.

    Raises:
        ValueError: fewer than `needed`; the message calls them `what`.
    """
    groups = by_length(tokenizer, words)
    best = max(groups.values(), key=len, default=[])
    if len(best) < needed:
        sizes = ", ".join(f"{len(group)} of {n} tokens" for n, group in sorted(groups.items()))
        raise ValueError(
            f"{what} of one length: {needed} are needed, and this tokenizer has {sizes or 'none'}."
        )
    return best
