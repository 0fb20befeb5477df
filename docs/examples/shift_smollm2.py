"""Shift the action logits of a language model: damage to choosing and to nothing else.

usage: python docs/examples/shift_smollm2.py CHECKPOINT OUT [SHIFT]
"""

from __future__ import annotations

import sys

from analyses.streams import read_streams
from mechinterp import lesions, load, tasks
from mechinterp.checkpoints import Provenance, save_checkpoint


def main(source: str, out: str, shift: float = 3.0) -> None:
    """Save a copy of `source` that favours " positive" over " negative" by `shift` log-odds."""
    model = load(source)
    task = tasks.get("sentiment", tokenizer=source)
    streams = read_streams(model, task.sample(144, split="train"), task, batch_size=32)
    shifted = lesions.shift_actions(
        model.model,
        task.actions,
        (-shift / 2, shift / 2),
        normed=streams.normed[model.n_layers],
    )
    provenance = Provenance(objective={"name": "lesion: shift_actions", "shift": shift})
    save_checkpoint(shifted, out, provenance=provenance, tokenizer=model.checkpoint)
    print(out)


if __name__ == "__main__":
    main(*sys.argv[1:3], *(float(value) for value in sys.argv[3:]))
