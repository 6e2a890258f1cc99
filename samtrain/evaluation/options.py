"""The `evaluation:` section: which held-out splits are generated and scored at the end of a run."""

from pydantic import Field

from samtrain.core.options import Options


class EvaluationOptions(Options):
    """splits: folders beside the training split; every task in a split is a set of its own (`eval/<split>.<task>/...`).

    batch_size: samples generated at once on a rank; it never changes the results.
    max_samples: at most so many of each split, the first of its order; null = all.
    num_examples: generations with their images in the tracked table.
    context_gain: also measure the loss with the true context, without one and with a shuffled one (context_gain.py):
        three forward passes a sample.
    """

    splits: list[str] = Field(default_factory=list)
    batch_size: int = Field(default=8, ge=1)
    max_samples: int | None = Field(default=None, ge=1)
    num_examples: int = Field(default=12, ge=0)
    context_gain: bool = False
