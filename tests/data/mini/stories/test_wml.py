"""The markup as the game reads it, and files that are not to be trusted."""

import os
from pathlib import Path

import pytest

from samtrain.data.mini.stories import wml
from samtrain.data.mini.stories.wml import FileTree, Node, Reader, WmlError, parse


def read(tmp_path: Path, text: str, *symbols: str) -> Reader:
    (tmp_path / "main.cfg").write_text(text)
    reader = Reader(FileTree(tmp_path), symbols=frozenset(symbols))
    reader.include("main.cfg")
    return reader


def only(reader: Reader) -> Node:
    assert reader.skipped == {}
    (document,) = reader.documents
    return document.root


def test_values_and_tags_are_read_in_order() -> None:
    root = parse('[a]\n  x=1\n  y = _ "two ""words""" + \n "and more"\n [b]\n [/b]\n[/a]\n[+c]\n x,y=1,2\n[/c]\n')
    first, second = root.children
    assert first.values == {"x": "1", "y": 'two "words"and more'}
    assert [child.tag for child in first.children] == ["b"]
    assert (second.tag, second.values) == ("c", {"x,y": "1,2"})
    assert [node.tag for node in root.walk()] == ["", "a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\n[b]\n[/a]\n", r"\[/a\] closes \[b\]"),
        ("[a]\n", r"\[a\] is not closed"),
        ("[/a]\n", "closes"),
        ('x="no end\n', "no end"),
        ("x=<<no end\n", "without `>>`"),
        ("only words\n", "neither a tag nor a value"),
        ("[a]\n" * 100, "nested too deeply"),
    ],
)
def test_damaged_markup_is_an_error(text: str, message: str) -> None:
    with pytest.raises(WmlError, match=message):
        parse(text)


def test_macros_take_arguments_in_parentheses_strings_and_braces(tmp_path: Path) -> None:
    text = """#define PAIR A B # two of them
[pair]
    a={A}
    b={B}
[/pair]
#enddef
#define WORD
deep#enddef
{PAIR (one two) "three four"}
{PAIR {WORD} ()}
{PAIR (a{WORD}b) _"text # no comment"} # a comment with { and "
#undef PAIR
{PAIR x y}
"""
    pairs = [node.values for node in only(read(tmp_path, text)).children]
    assert pairs == [
        {"a": "one two", "b": "three four"},
        {"a": "deep", "b": ""},
        {"a": "adeepb", "b": "text # no comment"},
    ]


def test_optional_arguments_have_defaults(tmp_path: Path) -> None:
    text = "#define M A\n#arg B\nusual#endarg\n#arg C\n{A}\n#endarg\nx={A}{B}{C}\n#enddef\n[a]\n{M 1}[/a]\n"
    assert only(read(tmp_path, text)).children[0].values == {"x": "1usual1"}
    text = text.replace("{M 1}", '{M 1 B=rare C="_see"}')
    assert only(read(tmp_path, text)).children[0].values == {"x": "1rare_see"}


def test_conditions_choose_a_branch_also_nested(tmp_path: Path) -> None:
    text = """#ifdef EASY
x=1
#else
#ifndef HARD
x=2
#endif
#ifdef NORMAL
y=3
#else
y=4
#endif
#endif
#ifhave main.cfg
z=5
#endif
"""
    assert only(read(tmp_path, text, "NORMAL")).values == {"x": "2", "y": "3", "z": "5"}
    assert only(read(tmp_path, text, "EASY")).values == {"x": "1", "z": "5"}


def test_a_folder_is_included_in_the_games_order(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    (folder / "sub").mkdir(parents=True)
    (folder / "plain").mkdir()
    for name in ("b.cfg", "a.cfg", "_final.cfg", "_initial.cfg", "sub/_main.cfg", "plain/c.cfg", "readme.txt"):
        (folder / name).write_text("x=1\n")
    reader = read(tmp_path, "{parts}\n{parts/readme.txt}\n")
    assert [document.path for document in reader.documents] == [
        *("parts/_initial.cfg", "parts/a.cfg", "parts/b.cfg", "parts/_final.cfg", "parts/sub/_main.cfg", "main.cfg")
    ]
    (folder / "_main.cfg").write_text("{./b.cfg}\n")
    assert [document.path for document in read(tmp_path, "{parts/}").documents] == [
        *("parts/b.cfg", "parts/_main.cfg", "main.cfg")
    ]


def test_a_damaged_file_is_skipped_and_listed_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "bad.cfg").write_text("[a]\n")
    (tmp_path / "binary.cfg").write_bytes(b"x=\xff\xfe\n")
    (tmp_path / "good.cfg").write_text("[fine]\n[/fine]\n")
    reader = read(tmp_path, "{./bad.cfg}\n{./binary.cfg}\n{./good.cfg}\n{./gone.cfg}\n")
    assert [document.path for document in reader.documents] == ["good.cfg", "main.cfg"]
    assert set(reader.skipped) == {"bad.cfg", "binary.cfg", "gone.cfg"}
    assert "not closed" in reader.skipped["bad.cfg"]


def test_no_name_leads_out_of_the_tree(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "secret.cfg").write_text("[secret]\n[/secret]\n")
    (root / "link.cfg").symlink_to(tmp_path / "secret.cfg")
    (root / "folder").symlink_to(tmp_path)
    os.symlink("circle.cfg", root / "circle.cfg")
    tree = FileTree(root)
    secret = str(tmp_path / "secret.cfg")
    for name in (
        "../secret.cfg",
        "in/../../secret.cfg",
        secret,
        "link.cfg",
        "folder/secret.cfg",
        "circle.cfg",
        "",
        "a\0",
    ):
        assert tree.find(name) is None, name
        with pytest.raises(WmlError):
            tree.read(name)
    assert tree.find("x" * 5000) is None
    assert tree.names("folder", ".cfg") == [] and tree.folders("") == []
    reader = read(
        root, f"{{../secret.cfg}}\n{{./../secret.cfg}}\n{{{secret}}}\n{{./link.cfg}}\n{{folder/secret.cfg}}\n"
    )
    assert [document.path for document in reader.documents] == ["main.cfg"]
    assert reader.skipped.keys() == {"../secret.cfg", secret, "link.cfg", "folder/secret.cfg"}
    (root / "inside.cfg").symlink_to(root / "main.cfg")  # a link that stays inside is a file like others
    assert tree.find("inside.cfg") == (root / "main.cfg").resolve()


def test_growth_nesting_and_size_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wml, "MAX_EXPANDED_CHARS", 100_000)
    laughs = "".join(f"#define L{i + 1}\n{{L{i}}}{{L{i}}}#enddef\n" for i in range(40))
    for zero in ("ha ", ""):
        reader = read(tmp_path, f"#define L0\n{zero}#enddef\n{laughs}x={{L40}}\n")
        assert "grow to more than 100000" in reader.skipped["main.cfg"]
    assert "nested too deeply" in read(tmp_path, "#define A\n{A}#enddef\n{A}\n").skipped["main.cfg"]
    assert "includes itself" in read(tmp_path, "{./main.cfg}\n").skipped["main.cfg"]
    for i in range(100):
        (tmp_path / f"f{i}.cfg").write_text(f"{{./f{i + 1}.cfg}}\n")
    reader = read(tmp_path, "{./f0.cfg}\n")
    assert any("nested too deeply" in why for why in reader.skipped.values())
    monkeypatch.setattr(wml, "MAX_FILES", 2)
    assert "more than 2 files" in " ".join(read(tmp_path, "{./f1.cfg}").skipped.values())
    monkeypatch.setattr(wml, "MAX_FILE_BYTES", 10)
    assert "more than 10" in read(tmp_path, "x=0123456789\n").skipped["main.cfg"]
