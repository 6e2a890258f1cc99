"""What is not kept of the finished samples, and why: texts, visibility, near-duplicates."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from samtrain.data.mmlink.options import COVERS, FilterOptions
from samtrain.data.mmlink.pictures import bits_apart
from samtrain.data.mmlink.plan import Plan
from samtrain.data.mmlink.records import content_words

_HASH_BITS = 64
_REFUSALS = re.compile(r"\b(as an ai|i'm sorry|i am sorry|i cannot|i can't|language model|unable to)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Finished:
    """A sample as the stages left it. contrasts: of the least visible thing, by picture. hashes: by picture.

    compose_ref, fill_ref: of its mask images ("" for covers) and of its pictures.
    """

    plan: Plan
    instruction: str
    answer: str
    contrasts: tuple[float, ...]
    hashes: tuple[str, ...]
    compose_ref: str = ""
    fill_ref: str = ""


def reason_against(sample: Finished, options: FilterOptions) -> str | None:
    """Why a sample is not kept, in words that can be counted; None where it is."""
    answer, instruction = sample.answer.split(), sample.instruction.split()
    if not options.min_answer_words <= len(answer) <= options.max_answer_words:
        return "length of the answer"
    if not 1 <= len(instruction) <= options.max_instruction_words:
        return "length of the instruction"
    if "<image>" in sample.instruction + sample.answer:
        return "text holds a placeholder of pictures"
    if _REFUSALS.search(sample.answer):
        return "the answer is a refusal"
    if options.answer_names_target and not _names_target(sample):
        return "the answer does not name what the pictures share"
    if sample.contrasts and min(sample.contrasts) < options.min_contrast:
        return "a thing hardly stands out from its background"
    return None


def _names_target(sample: Finished) -> bool:
    if sample.plan.domain == COVERS:
        said = sample.answer.lower()
        return any(value.lower() in said for value in sample.plan.common.values())
    return bool(content_words(sample.plan.target.name) & content_words(sample.answer))


class NearDuplicates:
    """Finds a kept sample of which every picture looks like this one's.

    Hashes are filed by `bits + 1` parts: two hashes that differ in at most `bits` bits agree in one part at least, so
    none is missed and few are compared.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._files: dict[tuple[int, int, int], list[tuple[str, tuple[str, ...]]]] = {}

    def find(self, hashes: tuple[str, ...]) -> str | None:
        """The key of one that is alike, in the same order of pictures."""
        for part in self._parts(hashes):
            for key, others in self._files.get(part, ()):
                if all(bits_apart(one, other) <= self.bits for one, other in zip(hashes, others, strict=True)):
                    return key
        return None

    def add(self, key: str, hashes: tuple[str, ...]) -> None:
        for part in self._parts(hashes):
            self._files.setdefault(part, []).append((key, hashes))

    def _parts(self, hashes: tuple[str, ...]) -> Iterable[tuple[int, int, int]]:
        """(number of pictures, number of the part, its bits) of the first picture's hash."""
        if not hashes:
            return
        value, count = int(hashes[0], 16), self.bits + 1
        for number in range(count):
            start, stop = _HASH_BITS * number // count, _HASH_BITS * (number + 1) // count
            yield len(hashes), number, (value >> start) & ((1 << (stop - start)) - 1)
