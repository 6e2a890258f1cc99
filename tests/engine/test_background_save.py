"""The thread behind a save: complete or nothing, and never in the way."""

import threading

import pytest

from samtrain.engine.background_save import BackgroundSave


def test_publishes_when_all_have_written_and_says_so():
    others, done = threading.Event(), []
    save = BackgroundSave(
        lambda: done.append("written"), is_written_by_all=others.is_set, publish=lambda: done.append("published")
    )
    save.wait_written()
    assert done == ["written"] and not save.has_news
    others.set()
    save.wait_published()
    assert done == ["written", "published"] and save.has_news


def test_another_rank_has_news_only_where_it_fails():
    save = BackgroundSave(lambda: None)
    save.wait_published()
    assert not save.has_news
    failing = BackgroundSave(_full_disk)
    with pytest.raises(OSError, match="no space"):
        failing.wait_written()
    assert failing.has_news


@pytest.mark.parametrize("part", ["write", "publish"])
def test_an_error_is_raised_to_who_waits_and_nothing_is_published(part):
    published = []
    parts = {"write": lambda: None, "publish": lambda: published.append(1)} | {part: _full_disk}
    save = BackgroundSave(parts["write"], is_written_by_all=lambda: True, publish=parts["publish"])
    with pytest.raises(OSError, match="no space"):
        save.wait_published()
    assert save.has_news and published == []


def test_gives_up_on_a_rank_that_never_writes():
    published = []
    save = BackgroundSave(lambda: None, is_written_by_all=lambda: False, publish=lambda: published.append(1))
    save.wait_or_give_up(0.0)
    assert published == [] and save.has_news


def _full_disk() -> None:
    raise OSError("no space")
