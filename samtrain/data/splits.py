"""The splits of a set, in a folder or in an object store, for those who look at sets whatever holds them."""

from pathlib import Path

from samtrain.core.errors import DataError
from samtrain.data.index import INDEX_FILE
from samtrain.data.lint import find_splits
from samtrain.data.storage import LOAD_RETRY_SECONDS, Location, Store, Url, parse_location


def find_places(path: str | Location) -> dict[str, Location]:
    """Split -> where its shards are: `path` itself, or the folders in it.

    Raises:
        DataError: there are no shards.
        ConfigError: a URL that is not allowed.
    """
    place = parse_location(path)
    if isinstance(place, Path):
        return dict(find_splits(place)[0])
    store = _store(place)
    folders = store.folders()
    listing = store.listing()
    if folders is None or listing is None or INDEX_FILE in listing:
        return {place.name: place}  # one that cannot list has to be given a split
    found: dict[str, Location] = {
        name: place / name for name in folders if INDEX_FILE in (_store(place / name).listing() or {})
    }
    if not found:
        raise DataError(f"{place}: neither it nor a folder in it holds {INDEX_FILE}; give a folder of shards")
    return found


def _store(place: Url) -> Store:
    return Store(place, retry_seconds=LOAD_RETRY_SECONDS)
