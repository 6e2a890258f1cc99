"""What lint can find, and what to do about each."""

from dataclasses import asdict, dataclass
from typing import Any

_CLEAN = "`--fix OUT` writes a set without it"


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    what: it, in a few words. advice: what to do. drops: a sample that has it is left out of a clean set; else the
    clean set has it mended. keepable: where the kind is ignored, such a sample stays in the clean set as it is.
    """

    what: str
    advice: str
    drops: bool = True
    keepable: bool = False


KINDS: dict[str, Kind] = {
    # Of a whole split: its index.
    "index-missing": Kind("no index beside the shards", "`samtrain data index FOLDER` writes it"),
    "index-broken": Kind("the index cannot be used", "`samtrain data index FOLDER` makes it anew from the shards"),
    "index-disagrees": Kind(
        "index and shards disagree", "copy the shards again if they changed by accident, else make the index anew"
    ),
    # Of a whole shard.
    "missing-shard": Kind("the index lists a shard that is not there", "copy it again, or make the index anew"),
    "unreadable-shard": Kind("a shard cannot be read", "copy it again"),
    "damaged-shard": Kind(
        "a tar is cut off, or damaged between its members", f"copy it again; {_CLEAN}, from the samples that are whole"
    ),
    "empty-shard": Kind("a tar without samples", "delete it and make the index anew"),
    # Of a member.
    "unsafe-name": Kind("a member's name leaves the folder or is no legal key", f"nobody should unpack it; {_CLEAN}"),
    "not-a-file": Kind("a member is a link or a device", f"links are never followed; {_CLEAN}"),
    "unlisted-image": Kind(
        "an image that its record does not list",
        "add it to the record, or let `--fix OUT` leave the member out",
        drops=False,
    ),
    # Of a sample.
    "missing-record": Kind("a sample without key.json", f"every sample needs its record; {_CLEAN}"),
    "broken-record": Kind("key.json is not a sample record", f"mend what made it; {_CLEAN}"),
    "wrong-key": Kind("the record says another key", f"mend what made it; {_CLEAN}"),
    "missing-image": Kind("the record lists an image that is not in the tar", f"mend what made it; {_CLEAN}"),
    "wrong-count": Kind("images and <image> placeholders disagree", f"write one for each image, or none; {_CLEAN}"),
    "broken-image": Kind("an image cannot be decoded", f"copy or make it again; {_CLEAN}"),
    "wrong-hash": Kind("an image is not the one its record describes (sha256)", f"copy the shard again; {_CLEAN}"),
    "wrong-size": Kind(
        "an image has another width or height than its record says", "`--fix OUT` writes the true size", drops=False
    ),
    "oversized-image": Kind("an image has too many pixels", f"scale it down; {_CLEAN}"),
    "oversized-member": Kind("a member has too many bytes", f"scale it down or cut it; {_CLEAN}"),
    "oversized-text": Kind("an instruction or an answer is too long", f"cut it; {_CLEAN}", keepable=True),
    "empty-text": Kind(
        "an instruction or an answer without words", f"there is nothing to learn from it; {_CLEAN}", keepable=True
    ),
    "unreadable-text": Kind(
        "a text holds characters that nobody can read", f"decode its source anew; {_CLEAN}", keepable=True
    ),
    "duplicate-member": Kind("a sample has a member twice", f"which of the two is meant is not known; {_CLEAN}"),
    "duplicate-key": Kind("a key is used twice", f"keys name samples in ledger and predictions; {_CLEAN}"),
    "duplicate-sample": Kind(
        "the same images with the same texts under another key",
        "a held-out sample must not be in training; `--fix OUT` keeps one, the held-out one where splits share it",
        keepable=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. shard and key are empty where it concerns a whole split or a whole shard."""

    kind: str
    split: str
    shard: str
    key: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
