"""Questions whose answer is only partly knowable: witnesses of known reliability say what it is.

How likely each answer is follows from who says what, so that the right confidence is known. A
network writes an answer and how sure it is; neither needs more than one token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import TaskError
from mechinterp.randomness import derive_generator
from mechinterp.tasks.base import CounterfactualPairs, Items, Latent, Task
from mechinterp.tasks.splits import SPLITS, deal, refuse_split
from mechinterp.tasks.written import Marks, Problems, WrittenTask

START, ASK, END, PAD, SILENT = range(5)
FIRST_ANSWER = 5
N_ANSWERS = 4
N_FILLERS = 4
N_BINS = 5  # of the favourite's probability
SHIFTS = ("none", "fewer", "unreliable")
CONFIDENCES = ("right", "random", "none")
CANDIDATES = 8  # questions drawn for each one wanted, from which those of split and level are taken
MOST_DRAWS = 100
MOST_GROUPS = 1_000_000  # all are listed, to be shared out among the splits


@dataclass(frozen=True)
class Questions(Task, WrittenTask):
    """`n_witnesses` witnesses, each of a kind, say one of four answers; all answers are equally
    likely before they speak. A witness of kind k says the right one with probability
    `reliabilities`[k], and each wrong one with the same share of the rest, so that

        P(answer a) = prod_i (r_i if says_i = a else (1 - r_i) / 3), normalised.

        <s> filler kind says kind says kind says ?     answer confidence <end>

    The confidence is one of `n_confidences` tokens for 0, ..., 1 in equal steps; a text without it
    has none. Labels are drawn, so that even a right choice may turn out wrong.

    As a decision it is the answer at "?". Needed are `strongest`, what the (first) most reliable
    witness says, and `favourite`, the (first) likeliest answer; not needed for choosing, but for
    saying how sure, is `sure`, the favourite's probability in five bins from 1/4 to 1. `filler` is
    needed for nothing. Level 1 to 5 is that bin, counted from the surest.

    `confidence` is what solutions say: "right", the probability of the answer that they give (it
    is the label), rounded; "random", any, so that only the form can be learned; "none".

    `shift` leaves what it was learned from: "fewer", one witness is silent; "unreliable", all
    witnesses are of the weaker half of the kinds. The posterior is right in all of them.

    Questions with the same witnesses in any order form a group and are of one split. Groups are
    dealt out in the order of their posterior, so that all splits are equally hard.
    """

    version: ClassVar[int] = 2

    reliabilities: tuple[float, ...] = (0.9, 0.7, 0.5, 0.25)
    n_witnesses: int = 3
    n_confidences: int = 11
    confidence: str = "right"
    shift: str = "none"

    name = "questions"
    pad_token = PAD
    end_token = END
    actions = tuple(range(FIRST_ANSWER, FIRST_ANSWER + N_ANSWERS))
    action_names = tuple("ABCD")
    utility = tuple(map(tuple, np.eye(N_ANSWERS).tolist()))
    latents = (
        Latent("strongest", N_ANSWERS),
        Latent("favourite", N_ANSWERS),
        Latent("sure", N_BINS, needed=False),
        Latent("filler", N_FILLERS, needed=False),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "reliabilities", tuple(float(r) for r in self.reliabilities))
        if len(self.reliabilities) < 1 or not all(0 < r < 1 for r in self.reliabilities):
            raise TaskError(
                f"questions: reliabilities must be in (0, 1), got {list(self.reliabilities)}"
            )
        if not 1 <= self.n_witnesses <= 8 or self.n_confidences < 2:
            raise TaskError("questions: n_witnesses must be in 1 .. 8, n_confidences at least 2")
        if self.shift == "fewer" and self.n_witnesses < 2:
            raise TaskError("questions: shift 'fewer' needs at least 2 witnesses")
        if math.comb(self._n_witness_values + self.n_witnesses - 1, self.n_witnesses) > MOST_GROUPS:
            raise TaskError(
                f"questions: {self.n_witnesses} witnesses of {len(self.reliabilities)} kinds can "
                f"say more than {MOST_GROUPS} things; use fewer of either"
            )
        if self.confidence not in CONFIDENCES or self.shift not in SHIFTS:
            raise TaskError(
                f"questions: confidence must be one of {', '.join(CONFIDENCES)} and shift one of "
                f"{', '.join(SHIFTS)}, got {self.confidence!r} and {self.shift!r}"
            )

    @property
    def _first_kind(self) -> int:
        return FIRST_ANSWER + N_ANSWERS

    @property
    def _first_filler(self) -> int:
        return self._first_kind + len(self.reliabilities)

    @property
    def _first_confidence(self) -> int:
        return self._first_filler + N_FILLERS

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self._first_confidence + self.n_confidences

    @property
    def n_positions(self) -> int:  # type: ignore[override]
        return 3 + 2 * self.n_witnesses

    @property
    def max_new_tokens(self) -> int:  # type: ignore[override]
        return 2 if self.confidence == "none" else 3

    def posterior(
        self, kinds: Int[Tensor, "items witnesses"], says: Int[Tensor, "items witnesses"]
    ) -> Float[Tensor, "items answers"]:
        """P(answer), by Bayes's rule; kind -1 says nothing."""
        reliable = torch.tensor(self.reliabilities, dtype=torch.float64)
        log_odds = reliable.log() - ((1 - reliable) / (N_ANSWERS - 1)).log()
        weight = log_odds[kinds].where(kinds >= 0, 0.0)
        evidence = torch.zeros(len(kinds), N_ANSWERS, dtype=torch.float64)
        # Whoever says the same weighs the same in any order: ties are ties.
        order = weight.argsort(dim=1, stable=True)
        evidence.scatter_add_(1, says.clamp(min=0).gather(1, order), weight.gather(1, order))
        return evidence.softmax(1)

    def right_confidence(self, problems: Problems) -> Float[Tensor, "problems answers"]:
        """How likely each answer is right: the confidence that a calibrated writer states."""
        return self.posterior(*self._witnesses(problems.tokens))

    def _witnesses(
        self, tokens: Int[Tensor, "items positions"]
    ) -> tuple[Int[Tensor, "items witnesses"], Int[Tensor, "items witnesses"]]:
        pairs = tokens[:, 2:-1].unflatten(1, (self.n_witnesses, 2))
        silent = pairs[..., 0] == SILENT
        kinds, says = pairs[..., 0] - self._first_kind, pairs[..., 1] - FIRST_ANSWER
        return kinds.where(~silent, -1), says.where(~silent, -1)

    def _draw(
        self,
        n: int,
        split: str,
        generator: torch.Generator,
        levels: Int[Tensor, " items"] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Kinds, what they say, fillers and labels of questions in `split` and of these levels."""
        wanted = torch.arange(n)
        found = [torch.empty((n, *more), dtype=torch.long) for more in [(self.n_witnesses,)] * 2]
        found += [torch.empty(n, dtype=torch.long) for _ in range(2)]
        for _ in range(MOST_DRAWS):
            drawn = self._candidates(CANDIDATES * len(wanted), generator)
            usable = self._in_split(self._group(*drawn[:2]), split)
            if levels is None:
                taken = usable.nonzero().flatten()[: len(wanted)]
                given = wanted[: len(taken)]
            else:
                level = N_BINS - self._bin(self.posterior(*drawn[:2]))
                taken, given = _match(level.where(usable, 0), levels[wanted])
                given = wanted[given]
            for whole, part in zip(found, drawn, strict=True):
                whole[given] = part[taken]
            wanted = wanted[~torch.isin(wanted, given)]
            if len(wanted) == 0:
                return tuple(found)  # type: ignore[return-value]
        level = "" if levels is None else f" of level {int(levels[wanted[0]])}"
        raise TaskError(
            f"questions: split {split!r} has hardly any question{level} with these reliabilities "
            f"and shift {self.shift!r}; ask for other levels"
        )

    def _candidates(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        reliable = torch.tensor(self.reliabilities, dtype=torch.float64)
        allowed = torch.arange(len(reliable))
        if self.shift == "unreliable":
            allowed = reliable.argsort(stable=True)[: max(1, len(reliable) // 2)]
        shape = (n, self.n_witnesses)
        kinds = allowed[torch.randint(0, len(allowed), shape, generator=generator)]
        labels = torch.randint(0, N_ANSWERS, (n,), generator=generator)
        is_right = torch.rand(shape, generator=generator) < reliable[kinds]
        error = torch.randint(1, N_ANSWERS, shape, generator=generator)
        says = (labels[:, None] + error.where(~is_right, 0)) % N_ANSWERS
        if self.shift == "fewer":
            silent = torch.randint(0, self.n_witnesses, (n, 1), generator=generator)
            kinds.scatter_(1, silent, -1)
            says.scatter_(1, silent, -1)
        fillers = torch.randint(0, N_FILLERS, (n,), generator=generator)
        return kinds, says, fillers, labels

    def _group(
        self, kinds: Int[Tensor, "items witnesses"], says: Int[Tensor, "items witnesses"]
    ) -> Int[Tensor, " items"]:
        """A number for who says what, in any order."""
        witness = (N_ANSWERS * kinds + says + 1).where(kinds >= 0, 0).sort(1).values
        return (witness * self._n_witness_values ** torch.arange(self.n_witnesses)).sum(1)

    @property
    def _n_witness_values(self) -> int:
        """A witness of each kind says one of the answers, or one says nothing."""
        return N_ANSWERS * len(self.reliabilities) + 1

    def _in_split(self, groups: Int[Tensor, " items"], split: str) -> Bool[Tensor, " items"]:
        return torch.isin(groups, self._groups[split] if split in SPLITS else refuse_split(split))

    @cached_property
    def _groups(self) -> dict[str, Int[Tensor, " groups"]]:
        """Those of each split. Alike under every shift: the silent are dealt out by themselves, and
        of equal posteriors those of the same kinds follow each other."""
        every = itertools.combinations_with_replacement(
            range(self._n_witness_values), self.n_witnesses
        )
        witness = torch.tensor(list(every)) - 1
        silent = witness < 0
        kinds, says = (x.where(~silent, -1) for x in (witness // N_ANSWERS, witness % N_ANSWERS))
        sure = self.posterior(kinds, says).amax(1)
        return deal(
            self._group(kinds, says),
            silent.sum(1),
            (sure * 1e9).round(),  # equal ones tie, however they are rounded
            self._group(kinds, torch.zeros_like(says)),
        )

    def _bin(self, posterior: Float[Tensor, "items answers"]) -> Int[Tensor, " items"]:
        share = (posterior.amax(1) - 1 / N_ANSWERS) / (1 - 1 / N_ANSWERS)
        # An edge that is met exactly, such as 0.7, is the upper bin's, however sums are rounded.
        return (share * N_BINS + 1e-9).floor().long().clamp(0, N_BINS - 1)

    def _write(
        self,
        kinds: Int[Tensor, "items witnesses"],
        says: Int[Tensor, "items witnesses"],
        fillers: Int[Tensor, " items"],
    ) -> Int[Tensor, "items positions"]:
        tokens = torch.full((len(kinds), self.n_positions), START)
        tokens[:, 1] = self._first_filler + fillers
        tokens[:, 2:-1:2] = (self._first_kind + kinds).where(kinds >= 0, SILENT)
        tokens[:, 3:-1:2] = (FIRST_ANSWER + says).where(kinds >= 0, SILENT)
        tokens[:, -1] = ASK
        return tokens

    def _items(self, kinds: Tensor, says: Tensor, fillers: Tensor, labels: Tensor) -> Items:
        posterior = self.posterior(kinds, says)
        reliable = torch.tensor([*self.reliabilities, -1.0], dtype=torch.float64)[
            kinds
        ]  # kind -1: the last
        strongest = reliable.argmax(1)
        roles = np.empty((len(kinds), self.n_positions), dtype=object)
        roles[:, 0], roles[:, 1], roles[:, -1] = "start", "filler", "decision"
        is_strongest = strongest.numpy()[:, None] == np.arange(self.n_witnesses)
        for place, word in ((2, "kind"), (3, "says")):
            roles[:, place:-1:2] = np.where(is_strongest, f"strongest {word}", f"other {word}")
        return Items(
            tokens=self._write(kinds, says, fillers),
            labels=labels,
            latents={
                "strongest": says.gather(1, strongest[:, None])[:, 0],
                "favourite": posterior.argmax(1),
                "sure": self._bin(posterior),
                "filler": fillers,
            },
            groups=self._group(kinds, says),
            roles=roles.astype(str),
            posterior=posterior,
        )

    def sample(self, n: int, *, seed: int = 0, split: str = "test") -> Items:
        generator = derive_generator(seed, "questions", split)
        return self._items(*self._draw(n, split, generator))

    def control_types(self, items: Items) -> Int[Tensor, " items"]:
        """The first witness: who, and what."""
        return items.tokens[:, 2] * self.vocab_size + items.tokens[:, 3]

    def counterfactual_pairs(
        self, n: int, *, seed: int = 0, split: str = "test"
    ) -> CounterfactualPairs:
        """One witness says something else, and with that another answer is the likeliest. `latent`
        is "strongest" where that witness is the most reliable, else "favourite": in turn, as long
        as there are both."""
        generator = derive_generator(seed, "questions", split, "pairs")
        kinds, says, fillers, labels = self._draw(64 * n, split, generator)
        rows = torch.arange(len(kinds))
        place = rows % self.n_witnesses
        changed = says.clone()
        error = torch.randint(1, N_ANSWERS, (len(rows),), generator=generator)
        changed[rows, place] = (says[rows, place] + error) % N_ANSWERS
        changed = changed.where(kinds >= 0, -1)
        clean, corrupt = (self._items(kinds, said, fillers, labels) for said in (says, changed))
        usable = (clean.latents["favourite"] != corrupt.latents["favourite"]) & self._in_split(
            corrupt.groups, split
        )
        by_strongest = clean.latents["strongest"] != corrupt.latents["strongest"]
        chosen = usable.nonzero().flatten()
        family = torch.nn.functional.one_hot((~by_strongest[chosen]).long(), 2)
        rank = (family.cumsum(0) * family).sum(1)
        chosen = chosen[torch.argsort(2 * rank + family[:, 1])][:n]
        if len(chosen) < n:
            raise TaskError(
                f"questions: found only {len(chosen)} of {n} pairs in split {split!r}: one witness "
                "hardly ever decides here; use fewer witnesses or more reliable ones"
            )
        roles = np.array(clean.roles[chosen], dtype=object)
        is_changed = place[chosen].numpy()[:, None] == np.arange(self.n_witnesses)
        for first, word in ((2, "kind"), (3, "says")):
            roles[:, first:-1:2] = np.where(is_changed, f"changed {word}", f"other {word}")
        return CounterfactualPairs(
            clean=clean.select(chosen),
            corrupt=corrupt.select(chosen),
            latent=np.where(by_strongest[chosen].numpy(), "strongest", "favourite"),
            roles=roles.astype(str),
            quality="exact: one witness says something else",
        )

    def problems(
        self,
        n: int,
        *,
        seed: int = 0,
        split: str = "train",
        levels: Sequence[int] | None = None,
        planted: float = 0.0,
    ) -> Problems:
        """See `WrittenTask`; entries are the labels. Without `levels` questions come as they do in
        `sample`. There are no shortcuts to plant."""
        chosen = None if levels is None else sorted(set(levels))
        if planted or chosen == [] or not set(chosen or []) <= set(range(1, N_BINS + 1)):
            raise TaskError(
                f"questions: levels are 1 .. {N_BINS}, and there are no shortcuts, got levels "
                f"{levels} and planted {planted}"
            )
        generator = derive_generator(seed, "questions", split, "problems")
        wanted = None
        if chosen is not None:
            wanted = torch.tensor(chosen).repeat(-(-n // len(chosen)))[:n]
            wanted = wanted[torch.randperm(n, generator=generator)]
        kinds, says, fillers, labels = self._draw(n, split, generator, wanted)
        posterior = self.posterior(kinds, says)
        solutions = torch.full((n, self.max_new_tokens), END)
        solutions[:, 0] = FIRST_ANSWER + labels
        if self.confidence != "none":
            steps = self.n_confidences - 1
            right = posterior.gather(1, labels[:, None])[:, 0]
            said = (right * steps).round().long()
            if self.confidence == "random":
                said = torch.randint(0, self.n_confidences, (n,), generator=generator)
            solutions[:, 1] = self._first_confidence + said
        tokens = self._write(kinds, says, fillers)
        no, yes = torch.zeros(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
        return Problems(
            tokens=tokens,
            mask=torch.ones_like(tokens, dtype=torch.bool),
            solutions=solutions,
            solution_mask=torch.ones_like(solutions, dtype=torch.bool),
            level=N_BINS - self._bin(posterior),
            planted=no,
            solvable=yes,
            entries=tuple(labels.tolist()),
        )

    def mark(
        self,
        problems: Problems,
        completions: Int[Tensor, "problems samples tokens"],
        mask: Bool[Tensor, "problems samples tokens"],
    ) -> Marks:
        """Right is the label, then a confidence or none, then the end; anything else is wrong."""
        labels = torch.tensor(problems.entries)[:, None]
        tokens = torch.nn.functional.pad(completions.where(mask, PAD), (0, 3), value=PAD)
        answer = tokens[..., 0] - FIRST_ANSWER
        answer = answer.where((answer >= 0) & (answer < N_ANSWERS), -1)
        said = tokens[..., 1] - self._first_confidence
        has_confidence = (said >= 0) & (said < self.n_confidences) & (answer >= 0)
        end = torch.where(has_confidence, tokens[..., 2], tokens[..., 1])
        # What stands in a confidence's place is what it is left out by, and learns from its score.
        has_place = answer >= 0 if self.confidence != "none" else has_confidence
        confidence_tokens = torch.zeros_like(mask)
        confidence_tokens[..., 1:2] = has_place[..., None] & mask[..., 1:2]
        stated = said / (self.n_confidences - 1)
        nothing = torch.full(answer.shape, torch.nan)
        return Marks(
            correct=(answer == labels) & (end == END) & problems.solvable[:, None],
            answer=answer,
            confidence=stated.where(has_confidence, nothing),
            confidence_tokens=confidence_tokens,
            steps_missing=nothing,
            steps_wrong=nothing,
        )


def _match(
    have: Int[Tensor, " candidates"], want: Int[Tensor, " places"]
) -> tuple[Int[Tensor, " matches"], Int[Tensor, " matches"]]:
    """Candidates and places of equal value, each at most once."""
    candidates, places = [], []
    for value in want.unique():
        mine, open_places = ((x == value).nonzero().flatten() for x in (have, want))
        n = min(len(mine), len(open_places))
        candidates.append(mine[:n])
        places.append(open_places[:n])
    return torch.cat(candidates), torch.cat(places)
