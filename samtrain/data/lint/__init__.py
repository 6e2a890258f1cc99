"""Lint of shards: walk (a tar, also a broken one) -> check (one sample) -> lint (all of them) -> fix (a clean set)."""

from samtrain.data.lint.check import Limits
from samtrain.data.lint.findings import KINDS, Finding
from samtrain.data.lint.lint import LintReport, find_splits, lint

__all__ = ["KINDS", "Finding", "Limits", "LintReport", "find_splits", "lint"]
