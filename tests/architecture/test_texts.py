"""What is committed runs anywhere: it names no path of one machine and no registry's host."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Spelt so that this file does not match itself.
MACHINE_PATHS = re.compile(r"(?<![\w.$}])/(?:work|root|home/\w+|Users/\w+|opt/pypi\S*|opt/wheels)(?:/|\b)")
REGISTRY_HOSTS = re.compile(
    r"\b(?:pypi\.org|files\.pythonhosted\.org|registry\.npmjs\.org|registry\.yarnpkg\.com|npmmirror\.com|"
    r"download\.pytorch\.org|deb\.debian\.org|conda\.anaconda\.org)\b".replace("\\.", "[.]")
)


def committed_texts() -> list[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    texts = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file() and name != "tests/architecture/test_texts.py":
            try:
                texts.append((name, path.read_text()))
            except UnicodeDecodeError:  # a picture
                continue
    return texts


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRY_HOSTS], ids=["machine paths", "registry hosts"])
def test_no_committed_text_names(pattern: re.Pattern[str]) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in committed_texts()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == [], "\n".join(found)


def test_the_patterns_find_what_they_are_for() -> None:
    assert MACHINE_PATHS.search("see /" + "work/main/x") and MACHINE_PATHS.search('"/' + 'root/.cache"')
    assert REGISTRY_HOSTS.search("https://" + "pypi" + ".org/simple")
    assert not MACHINE_PATHS.search("frame/work/x") and not MACHINE_PATHS.search("${HOME}/work")
