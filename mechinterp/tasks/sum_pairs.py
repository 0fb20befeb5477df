"""Two texts of a sum that differ in the prompt, in the scratchpad or in both."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.errors import TaskError
from mechinterp.tasks.splits import in_split
from mechinterp.tasks.sums import MOST_DRAWS, draw_terms, group_of

PAIRS = ("both", "prompt", "scratchpad")
QUALITY = {
    "both": "exact: one number differs, and the sums that follow from it",
    "prompt": "contradictory: one number differs, the sums are those of the clean text",
    "scratchpad": "contradictory: one digit of the last sum shown differs, the prompt does not",
}


@dataclass(frozen=True)
class SumPairs:
    """Clean texts have the numbers `terms` and their `sums`; the corrupt ones `changed` and
    `shown`, and the answer that follows from what differs is that of the sums `believed`."""

    terms: Int[Tensor, "pairs terms"]
    sums: Int[Tensor, "pairs sums"]
    changed: Int[Tensor, "pairs terms"]
    shown: Int[Tensor, "pairs sums"]
    believed: Int[Tensor, "pairs sums"]
    place: Int[Tensor, " pairs"]  # the term that differs, where one does

    def __len__(self) -> int:
        return len(self.terms)

    def select(self, index: Tensor) -> SumPairs:
        return SumPairs(*(getattr(self, f.name)[index] for f in fields(self)))


def draw_pairs(
    n: int, *, kind: str, decision: str, n_terms: int, split: str, generator: torch.Generator
) -> SumPairs:
    """`n` pairs with different answers to `decision`, each term changed in turn; in the splits of
    both prompts. Where the decision is not on the tens, the two totals have the same."""
    found = None
    for _ in range(MOST_DRAWS):
        drawn = _candidates(max(64, 4 * n), kind, decision, n_terms, split, generator)
        if found is not None:
            both = [(getattr(found, f.name), getattr(drawn, f.name)) for f in fields(SumPairs)]
            drawn = SumPairs(*map(torch.cat, both))
        found = drawn
        order = _in_turn(found.place)
        if len(found) >= n:
            return found.select(order[:n])
    raise TaskError(
        f"arithmetic: split {split!r} has too few pairs of {n_terms} terms whose {decision} differ "
        f"by the {kind}; raise n_terms"
    )


def _in_turn(place: Int[Tensor, " pairs"]) -> Int[Tensor, " pairs"]:
    """An order in which all places come once, then all once more, and so on."""
    of_each = torch.nn.functional.one_hot(place)
    same_before = (of_each.cumsum(0) * of_each).sum(1)
    return torch.argsort(same_before * of_each.shape[1] + place)


def _candidates(
    n: int, kind: str, decision: str, n_terms: int, split: str, generator: torch.Generator
) -> SumPairs:
    terms = draw_terms(torch.full((n,), n_terms), split=split, generator=generator)
    sums = terms.cumsum(1)[:, 1:]
    place = torch.arange(n) % n_terms
    shift = torch.randint(1, 10, (n,), generator=generator)
    changed = terms
    if kind == "scratchpad":
        shown, believed = _change_scratchpad(terms, sums, shift, decision)
        usable = (believed[:, -1] >= 0) & (believed[:, -1] <= 9 * n_terms)
    else:
        changed = terms.clone()
        rows = torch.arange(n)
        changed[rows, place] = (terms[rows, place] + shift) % 10
        believed = changed.cumsum(1)[:, 1:]
        shown = sums if kind == "prompt" else believed
        usable = in_split(group_of(changed), split)
    same_tens = sums[:, -1] // 10 == believed[:, -1] // 10
    if decision == "tens":
        usable &= ~same_tens
    else:
        usable &= same_tens & (sums[:, -1] % 10 != believed[:, -1] % 10)
    return SumPairs(terms, sums, changed, shown, believed, place).select(usable)


def _change_scratchpad(
    terms: Int[Tensor, "pairs terms"],
    sums: Int[Tensor, "pairs sums"],
    shift: Int[Tensor, " pairs"],
    decision: str,
) -> tuple[Int[Tensor, "pairs sums"], Int[Tensor, "pairs sums"]]:
    """Sums with one digit changed in the last one that the text shows, and what follows."""
    shown = sums.clone()
    last = -2 if decision == "step" else -1
    if decision == "tens":  # as if the last addition carried where it did not, or the reverse
        before = terms[:, :-1].sum(1)
        carries = sums[:, -1] // 10 > before // 10
        shown[:, -1] += torch.where(carries, -10, 10)
    else:
        shown[:, last] = shown[:, last] // 10 * 10 + (shown[:, last] + shift) % 10
    believed = shown.clone()
    if decision == "step":
        believed[:, -1] = shown[:, -2] + terms[:, -1]
    return shown, believed
