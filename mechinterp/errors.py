"""Errors that a user can act on. Each message names the file or field and the remedy, in one line.

The command line prints the message alone and exits with status 2; everything else is a defect of
ours and keeps its traceback.
"""

from __future__ import annotations


class MechinterpError(Exception):
    """Base of every error caused by input rather than by a defect."""


class CheckpointError(MechinterpError):
    """A checkpoint cannot be opened, or two checkpoints cannot be compared."""


class ModelError(MechinterpError):
    """A model does not compute what its hooks claim, or its structure is not supported."""


class SiteError(MechinterpError):
    """A site is misspelt, does not exist in this model, or cannot be written."""


class TaskError(MechinterpError):
    """A task is unknown, its settings are invalid, or it does not fit the model."""


class SpecError(MechinterpError):
    """A study or task file is invalid."""


class TrainingError(MechinterpError):
    """Training met a NaN, or what it finds on disk belongs to another run."""


class ConvergenceError(MechinterpError):
    """A fit did not reach its stated tolerance."""


class AnalysisError(MechinterpError):
    """An analysis was asked for something its inputs cannot give."""


class StoreError(MechinterpError):
    """Stored activations are damaged, unfinished or of something else, or the disk is full."""
