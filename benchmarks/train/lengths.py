"""How long texts are: `mini` from the real set mmlink-mini, `long` near the ends of the model's budgets.

`lengths.json` was made by `python -m benchmarks.train.lengths FOLDER` of the training split, with the tokenizers the
mini recipe uses (SmolLM2's for the LLM, BERT's word pieces for the Q-Former).
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

FILE = Path(__file__).with_name("lengths.json")

Text = Literal["mini", "long"]
TEXTS: dict[Text, str] = {
    "mini": "text lengths of mmlink-mini's training split (4,000 samples), images drawn from 2 to 5",
    "long": "instruction 64 to 128 tokens, answer 32 to 256, each equally likely; images drawn from 2 to 5",
}


@dataclass(frozen=True)
class Lengths:
    """prompt: LLM tokens of the instruction with bos. answer: with eos. qformer_text: Q-Former tokens."""

    prompt: int
    answer: int
    qformer_text: int
    images: int


def draw(text: Text, count: int, *, seed: int) -> list[Lengths]:
    """The same samples for the same arguments, on any machine."""
    random = Random(f"{text} {seed}")
    if text == "mini":
        rows = read()["rows"]
        chosen = random.choices(rows, weights=[row[4] for row in rows], k=count)
        return [Lengths(row[0], row[1], row[2], random.randint(2, 5)) for row in chosen]
    found = []
    for _ in range(count):
        prompt = random.randint(64, 128)
        found.append(Lengths(prompt, random.randint(32, 256), prompt, random.randint(2, 5)))
    return found


def read() -> dict:
    return json.loads(FILE.read_text())


def measure(folder: Path, llm: Callable[[str], int], qformer: Callable[[str], int]) -> list[list[int]]:
    """[prompt, answer, qformer text, images, how many such samples], sorted.

    Args:
        llm, qformer: number of tokens of a text, without special tokens.
    """
    from samtrain.core.errors import DataError
    from samtrain.core.sample import IMAGE_PLACEHOLDER
    from samtrain.data.index import ShardIndex

    index = ShardIndex.load(folder)
    counts: Counter[tuple[int, ...]] = Counter()
    for record in index.read_records(range(len(index))):
        if isinstance(record, DataError):
            raise record
        instruction = record.instruction.replace(IMAGE_PLACEHOLDER, "")
        row = (llm(instruction) + 1, llm(record.output) + 1, qformer(instruction) + 2, len(record.images))
        counts[row] += 1
    return [[*row, count] for row, count in sorted(counts.items())]


def main(folder: Path) -> None:
    from transformers import AutoTokenizer

    from samtrain.data.index import ShardIndex
    from samtrain.model.packaged import packaged_folder

    def counter(name: str) -> Callable[[str], int]:
        tokenizer = AutoTokenizer.from_pretrained(packaged_folder(name))
        return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)

    rows = measure(folder, counter("smollm2-135m-instruct"), counter("minilm-l6"))
    content = {
        "columns": ["prompt tokens with bos", "answer tokens with eos", "Q-Former text tokens", "images", "samples"],
        "digest": ShardIndex.load(folder).digest,
        "rows": rows,
    }
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps({k: v for k, v in content.items() if k != "rows"}, indent=1)
    FILE.write_text(head[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main(Path(sys.argv[1]))
