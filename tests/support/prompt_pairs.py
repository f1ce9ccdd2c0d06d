"""Tasks for tests: random tokens, and stories260K's own pronouns."""

from __future__ import annotations

import torch

from tl_edgeprune.tasks import Task

GIRLS = ("Lily", "Sara", "Anna", "Lucy", "Mia", "Amy", "Jane", "Sue")
NAMES = (*GIRLS, "Tom", "Ben", "Max", "Tim", "Sam", "Jack", "Bob", "Timmy")


def random_task(model, n: int = 5, lengths=(5, 7), seed: int = 0, read: int = 1, **fields) -> Task:
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randint(model.cfg.d_vocab, (count,), generator=generator)

    sizes = [lengths[pair % len(lengths)] for pair in range(n)]
    clean, corrupted = ([draw(size) for size in sizes] for _ in range(2))
    answers = [draw(read) for _ in sizes]
    others = [(answer + 1 + draw(read) % 9) % model.cfg.d_vocab for answer in answers]
    read_at = [torch.arange(size - read, size) for size in sizes]
    own = {"answers": answers, "distractors": others}
    return Task("random", clean, corrupted, read_at, **own | fields)


def pronouns(model, names=NAMES) -> Task:
    """stories260K's own behaviour: girls go to the park as She, boys as He."""
    tokenizer = model.tokenizer
    he, she = (
        tokenizer(f" {word}", add_special_tokens=False).input_ids[-1] for word in ("He", "She")
    )
    prompts = [tokenizer(f"Once upon a time, {n} went to the park.").input_ids for n in names]
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    clean, corrupted, answers, groups = [], [], [], []
    for places in by_length.values():
        for place in places:
            others = [p for p in places if (names[p] in GIRLS) != (names[place] in GIRLS)]
            if others:
                clean.append(torch.tensor(prompts[place]))
                corrupted.append(torch.tensor(prompts[others[0]]))
                answers.append(she if names[place] in GIRLS else he)
                groups.append("girl" if names[place] in GIRLS else "boy")
    return Task(
        "pronouns",
        clean,
        corrupted,
        [torch.tensor([len(tokens) - 1]) for tokens in clean],
        [torch.tensor([token]) for token in answers],
        [torch.tensor([he + she - token]) for token in answers],
        groups=tuple(groups),
    )
