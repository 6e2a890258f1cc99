"""One sample from its split and number alone: the same whichever process makes it, and whatever was made before."""

from pathlib import Path
from typing import Any

import numpy as np

from samtrain.core.seeds import derive_seed
from samtrain.data.mini import texts
from samtrain.data.mini.art import Stock
from samtrain.data.mini.catalog import build_catalog
from samtrain.data.mini.compose import Picture, compose, nearest
from samtrain.data.mini.plans import CATEGORY, LINKING, SPLITS, Plan, Planner

SOURCE = "mmlink-mini"


class SampleMaker:
    """Makes any sample of any split. Deterministic in (seed, split, index).

    Raises:
        DataError: too few identities for a split.
    """

    def __init__(self, stock_path: Path, *, max_identities: int | None, seed: int) -> None:
        self.stock = Stock(stock_path)
        self.identities = build_catalog(self.stock, max_identities=max_identities)
        self.planners = {split: Planner(self.identities, split) for split in SPLITS}
        self.seed = seed

    def __call__(self, split: str, index: int) -> dict[str, Any]:
        """The keyword arguments of `ShardWriter.write`."""
        rng = np.random.default_rng(derive_seed("mmlink-mini", self.seed, split, index))
        plan = self.planners[split].plan(index, rng)
        pictures = []
        for i, things in enumerate(plan.pictures):
            layout = "free" if plan.task != LINKING else "alone" if i == 0 else "grid"
            held_out = split.startswith("test")
            pictures.append(compose(things, layout=layout, stock=self.stock, rng=rng, held_out_background=held_out))
        instruction, output, facts = _texts(plan, pictures, rng)
        return {
            "key": f"{split}-{index:06d}",
            "task": plan.task,
            "instruction": instruction,
            "output": output,
            "images": [picture.jpeg for picture in pictures],
            "source": SOURCE,
            "meta": {
                "split": split,
                "part": "linking" if plan.task == LINKING else "group",
                "subset": plan.subset,
                **facts,
                "pictures": [{"objects": picture.objects, "background": picture.background} for picture in pictures],
            },
            "extra": {f"{i}.mask.png": picture.mask_png for i, picture in enumerate(pictures)},
        }


def _texts(plan: Plan, pictures: list[Picture], rng: np.random.Generator) -> tuple[str, str, dict[str, Any]]:
    """Instruction, answer, and the facts the answer states."""
    form = int(rng.integers(840))  # divisible by every number of forms
    facts: dict[str, Any] = {"kind": plan.kind.name}
    if plan.task == LINKING:
        assert plan.target is not None
        objects = pictures[plan.asked - 1].objects
        neighbour = nearest(objects)
        assert neighbour is not None  # compose made sure
        name = texts.NAMES[int(rng.integers(len(texts.NAMES)))]
        instruction, output = texts.linking_texts(
            name=name,
            place=objects[0]["place"],
            neighbour=neighbour["identity"],
            asked=plan.asked,
            num_images=len(pictures),
            form=form,
        )
        facts |= {
            "target": plan.target.label,
            "name": name,
            "asked_picture": plan.asked,
            "place": objects[0]["place"],
            "beside": neighbour["identity"],
        }
    elif plan.subset == CATEGORY:
        instruction, output = texts.category_texts(plan.kind, form)
    else:
        assert plan.target is not None
        instruction, output = texts.common_texts(plan.target.label, form)
        facts["target"] = plan.target.label
    return instruction, output, facts
