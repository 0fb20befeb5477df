"""Sentiment: one adjective decides whether a review is positive. For language models as they are.

Two examples and a line such as "Review: a dreadful hotel. Sentiment:", answered by " positive" or "
negative". The adjective's polarity is the latent that decides; what is reviewed, a work or a place,
is one that the decision can forget. Items of one adjective form a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mechinterp.errors import TaskError
from mechinterp.randomness import derive_rng
from mechinterp.tasks.base import CounterfactualPairs, Items, Latent, Task, check_utility

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = (
    "Review: a good film. Sentiment: positive\nReview: a cruel film. Sentiment: negative\nReview: a"
)
ANSWER = ". Sentiment:"
POSITIVE = """happy beautiful wonderful great lovely brilliant delightful excellent pleasant perfect
    superb amazing charming elegant fantastic gorgeous graceful impressive magnificent marvelous
    remarkable splendid stunning fascinating inspiring enjoyable delicious fun fresh friendly
    generous warm smart powerful rich vivid witty clever refreshing memorable""".split()
NEGATIVE = """sad ugly terrible awful horrible painful nasty dreadful miserable bad poor boring dull
    weak stupid cheap dirty harsh rude cold messy broken annoying disappointing disgusting pathetic
    ridiculous shameful tragic unpleasant useless worthless wrong tedious bland bitter hostile toxic
    gloomy grim""".split()
WORKS = "film book song story".split()
PLACES = "hotel room city park".split()
SPLITS = {"train": 0.25, "validation": 0.25, "test": 0.5}
SPLIT_SEED = 0


@dataclass(frozen=True)
class Sentiment(Task):
    """`tokenizer` is a checkpoint directory; words that it does not write as one token are left
    out, so that all prompts have equal length."""

    tokenizer: str
    utility: Any = ((1.0, 0.0), (0.0, 1.0))

    name = "sentiment"
    action_names = ("negative", "positive")
    latents = (Latent("polarity", 2, needed=True), Latent("place", 2, needed=False))

    def __post_init__(self) -> None:
        object.__setattr__(self, "utility", check_utility(self.utility, n=2))

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from mechinterp.checkpoints import open_checkpoint

        return open_checkpoint(self.tokenizer, require_tokenizer=True).load_tokenizer()

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    @cached_property
    def actions(self) -> tuple[int, ...]:  # type: ignore[override]
        ids = [self._ids(f" {name}") for name in self.action_names]
        if any(len(tokens) != 1 for tokens in ids):
            raise TaskError(
                f"sentiment: the tokenizer of {self.tokenizer} does not write ' positive' and "
                "' negative' as one token each; use another task"
            )
        return tuple(tokens[0] for tokens in ids)

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return len(self._tokenizer)

    @property
    def n_positions(self) -> int:  # type: ignore[override]
        return len(self._ids(EXAMPLES)) + 2 + len(self._ids(ANSWER))

    def _one_token(self, words: Sequence[str]) -> dict[str, int]:
        ids = {word: self._ids(f" {word}") for word in words}
        return {word: tokens[0] for word, tokens in ids.items() if len(tokens) == 1}

    @cached_property
    def _adjectives(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and polarities; as many of each polarity."""
        positive, negative = (list(self._one_token(w).values()) for w in (POSITIVE, NEGATIVE))
        n = min(len(positive), len(negative))
        if n < 12:
            raise TaskError(
                f"sentiment: the tokenizer of {self.tokenizer} writes only {n} adjectives of a "
                "polarity as one token; 12 are needed"
            )
        return np.array(positive[:n] + negative[:n]), np.repeat([1, 0], n)

    @cached_property
    def _nouns(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, and whether it is a place."""
        works, places = (list(self._one_token(words).values()) for words in (WORKS, PLACES))
        return np.array(works + places), np.array([0] * len(works) + [1] * len(places))

    def _adjectives_of(self, split: str) -> np.ndarray:
        """Indices of the split's adjectives, half of each polarity."""
        if split not in SPLITS:
            raise TaskError(f"sentiment: no split {split!r}; the splits are {', '.join(SPLITS)}")
        polarity = self._adjectives[1]
        edges = np.cumsum([0.0, *SPLITS.values()])
        part = list(SPLITS).index(split)
        chosen = []
        for side in (0, 1):
            members = np.flatnonzero(polarity == side)
            members = derive_rng(SPLIT_SEED, "sentiment", side).permutation(members)
            low, high = np.round(edges[part : part + 2] * len(members)).astype(int)
            chosen.append(members[low:high])
        return np.concatenate(chosen)

    def _items(self, adjective: np.ndarray, noun: np.ndarray) -> Items:
        words, polarity = self._adjectives
        nouns, place = self._nouns
        before, after = self._ids(EXAMPLES), self._ids(ANSWER)
        tokens = np.empty((len(adjective), self.n_positions), dtype=np.int64)
        tokens[:, : len(before)] = before
        tokens[:, len(before)] = words[adjective]
        tokens[:, len(before) + 1] = nouns[noun]
        tokens[:, len(before) + 2 :] = after
        roles = [*["examples"] * len(before), "adjective", "noun", *["answer cue"] * len(after)]
        roles[-1] = "decision"
        labels = torch.from_numpy(polarity[adjective])
        return Items(
            tokens=torch.from_numpy(tokens),
            labels=labels,
            latents={"polarity": labels, "place": torch.from_numpy(place[noun])},
            groups=torch.from_numpy(adjective.copy()),
            roles=np.broadcast_to(np.array(roles), tokens.shape),
            posterior=torch.nn.functional.one_hot(labels, 2).double(),
        )

    def sample(self, n: int, *, seed: int = 0, split: str = "test") -> Items:
        """Distinct reviews in random order, all of the split if it holds fewer than `n`."""
        adjectives = self._adjectives_of(split)
        grid = np.stack(np.meshgrid(adjectives, np.arange(len(self._nouns[0]))), -1).reshape(-1, 2)
        chosen = derive_rng(seed, "sentiment", split).permutation(grid)[:n]
        return self._items(chosen[:, 0], chosen[:, 1])

    def counterfactual_pairs(
        self, n: int, *, seed: int = 0, split: str = "test"
    ) -> CounterfactualPairs:
        """The same review with an adjective of the other polarity; both polarities in turn."""
        adjectives = self._adjectives_of(split)
        polarity = self._adjectives[1]
        rng = derive_rng(seed, "sentiment", split, "pairs")
        sides = [adjectives[polarity[adjectives] == side] for side in (1, 0)]
        turn = np.arange(n) % 2
        clean = np.where(turn == 0, rng.choice(sides[0], n), rng.choice(sides[1], n))
        corrupt = np.where(turn == 0, rng.choice(sides[1], n), rng.choice(sides[0], n))
        noun = rng.integers(0, len(self._nouns[0]), n)
        items = self._items(clean, noun)
        return CounterfactualPairs(
            clean=items,
            corrupt=self._items(corrupt, noun),
            latent=np.full(n, "polarity"),
            roles=items.roles,
            quality="exact: one adjective differs; all words are single tokens",
        )

    def control_types(self, items: Items) -> torch.Tensor:
        """The adjective itself: memorising it is what a control task measures."""
        return items.groups
