"""What can go wrong, by kind. Every message says what was asked, what was found and what to do."""

from __future__ import annotations


class DataError(ValueError):
    """Images, labels or a data set's files are not usable."""


class SettingError(ValueError):
    """A recipe, budget, metric, objective or other setting makes no sense."""


class TrainingDiverged(ValueError):
    """The training loss is no longer a finite number."""


class CheckpointError(ValueError):
    """A checkpoint is corrupt, or belongs to another training run."""


class StudyError(ValueError):
    """A study cannot be opened, continued or finished."""


class ResumeError(StudyError):
    """A study was written by another space, objective or strategy than the one that would continue it."""


class SpaceExhausted(StudyError):
    """A strategy has proposed every architecture it can; the search ends normally."""


class TableError(ValueError):
    """A tabular benchmark is unreadable, or has no such row or metric."""


class WeightsError(ValueError):
    """A trial has no trained weights to build from."""
