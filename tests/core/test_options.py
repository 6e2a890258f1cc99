import pytest
from pydantic import Field

from samtrain.core.errors import ConfigError
from samtrain.core.options import Options, parse_options


class Inner(Options):
    width: int = Field(default=4, ge=1)
    names: list[str] = Field(default_factory=list)


class Outer(Options):
    inner: Inner = Inner()
    maybe: Inner | None = None
    rate: float = 0.5
    flag: bool = False


def message(values: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_options(Outer, values, source="file.yaml")
    return str(caught.value)


def test_good_values_parse_and_defaults_fill_the_rest() -> None:
    assert parse_options(Outer, {"inner": {"width": 2}}, source="x") == Outer(inner=Inner(width=2))


def test_a_whole_number_is_a_float_but_text_is_no_number_and_a_number_no_flag() -> None:
    assert parse_options(Outer, {"rate": 1}, source="x").rate == 1.0
    assert "`rate` = '1'" in message({"rate": "1"})
    assert "`flag` = 1" in message({"flag": 1})


def test_an_unknown_key_behind_an_optional_section_gets_a_hint_too() -> None:
    assert message({"maybe": {"widht": 3}}) == "file.yaml: unknown key `maybe.widht`; did you mean `width`?"


def test_a_list_item_is_named_by_its_place() -> None:
    assert "`inner.names.1` = 3" in message({"inner": {"names": ["a", 3]}})


def test_options_are_frozen_and_safe_to_share() -> None:
    with pytest.raises(ValueError):
        Outer().rate = 2.0  # type: ignore[misc]
