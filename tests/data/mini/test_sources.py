"""Untrusted tarballs: pinned, and read without unpacking."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from samtrain.core.errors import DataError
from samtrain.data.mini import sources

SMALLEST = sources.STYLE_PACKAGES["streamline-emojis"]


def _tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_a_changed_tarball_is_refused(cache: Path, tmp_path: Path) -> None:
    good = sources.tarball(SMALLEST, cache=cache / "mini")
    copy = tmp_path / "tarballs" / good.name
    copy.parent.mkdir()
    shutil.copy(good, copy)
    assert sources.tarball(SMALLEST, cache=tmp_path) == copy
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    with pytest.raises(DataError, match=r"integrity is sha512-.*expected sha512-iNr9") as caught:
        sources.tarball(SMALLEST, cache=tmp_path)
    assert str(copy) in str(caught.value)


def test_what_npm_brings_is_checked_before_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in registry: an `npm` that packs something else."""
    programs = tmp_path / "programs"
    programs.mkdir()
    npm = programs / "npm"
    npm.write_text('#!/bin/sh\necho "not the art" > "$4/package.tgz"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(DataError, match=r"not the pinned @iconify-json/streamline-emojis@1\.2\.4"):
        sources.tarball(SMALLEST, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_failing_npm_is_reported_with_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'registry says 404' >&2\nexit 3\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(sources.SourcesUnavailable, match="exit code 3: registry says 404"):
        sources.tarball(SMALLEST, cache=tmp_path / "cache")


def test_only_plain_members_of_that_exact_name_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"secret": 1}')
    link = tarfile.TarInfo("package/info.json")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    with pytest.raises(DataError, match="no plain file"):
        sources.read_member(_tar(tmp_path / "link.tgz", (link, b"")), "package/info.json")
    plain = _tar(tmp_path / "plain.tgz", (tarfile.TarInfo("package/info.json"), json.dumps({"a": 1}).encode()))
    assert sources.read_member(plain, "package/info.json") == {"a": 1}
    with pytest.raises(DataError, match="has no member"):
        sources.read_member(plain, "../info.json")
    monkeypatch.setattr(sources, "_MAX_MEMBER_BYTES", 3)
    with pytest.raises(DataError, match="at most 3 bytes"):
        sources.read_member(plain, "package/info.json")
    with pytest.raises(DataError, match="fetched again"):
        sources.read_member(secret, "package/info.json")
