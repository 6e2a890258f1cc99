"""Which pictures show a unit."""

import pytest

from samtrain.data.mini.stories.units import MAX_POSES, UnitTypes, frames
from samtrain.data.mini.stories.wml import parse

TYPES = """
[unit_type]
    id=Elder
    name= _ "male^Elder"
    image="u/elder-se-2.png~RC(magenta>red)"
    [standing_anim]
        [if]
            [frame]
                image=u/elder-se-[1~3].png:150
            [/frame]
        [/if]
    [/standing_anim]
    [attack_anim]
        [missile_frame]
            image=u/elder-se-arrow.png
        [/missile_frame]
        [frame]
            image="u/elder-se-hit-[1~9].png:[50*9]"
        [/frame]
        [frame]
            image="u/elderly.png,halo/elder-se-glow.png"
        [/frame]
    [/attack_anim]
    [death]
        [frame]
            image=u/elder-se-fall.png
        [/frame]
    [/death]
    [female]
        image=u/elder+f.png
        [attack_anim]
            [frame]
                image=u/elder+f-hit.png
            [/frame]
        [/attack_anim]
    [/female]
    [variation]
        variation_id=old
        image=u/old.png
    [/variation]
[/unit_type]
[unit_type]
    id=White Elder
    name=White Elder
    [base_unit]
        id=Elder
    [/base_unit]
[/unit_type]
[unit_type]
    id=Loop
    [base_unit]
        id=Loop
    [/base_unit]
[/unit_type]
"""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.png", ["a.png"]),
        ("a.png:100", ["a.png"]),
        ("a-[1~3].png:[100*3]", ["a-1.png", "a-2.png", "a-3.png"]),
        ("a[03~1].png", ["a03.png", "a02.png", "a01.png"]),
        ("a-[1,3*2,n].png:50,b.png~RC(x>y,z):1", ["a-1.png", "a-3.png", "a-n.png", "b.png"]),
        ("a.png~CS(1,2,3)~FL():[20*4]", ["a.png"]),
        ("misc/blank.ogg", []),
        ("a-[1~2]-[1~2].png", []),
        ("a-[1~99999].png", ["a-1~99999.png"]),
    ],
)
def test_frames_are_listed(value: str, expected: list[str]) -> None:
    assert frames(value) == expected


def test_poses_are_the_units_own_frames_two_of_an_action() -> None:
    types = UnitTypes([parse(TYPES)])
    look = types.look("Elder")
    assert look is not None and look.name == "Elder"
    assert look.poses[0] == "u/elder-se-2.png"
    assert set(look.poses[1:]) == {
        "u/elder-se-1.png",
        "u/elder-se-3.png",
        "u/elder-se-hit-1.png",
        "u/elder-se-hit-5.png",
    }


def test_gender_variation_and_base_have_their_say() -> None:
    types = UnitTypes([parse(TYPES)])
    woman, old, white = (
        types.look("Elder", gender="female"),
        types.look("Elder", variation="old"),
        types.look("White Elder"),
    )
    assert woman is not None and woman.poses == ("u/elder+f.png", "u/elder+f-hit.png")
    assert old is not None and old.poses == ("u/old.png",)
    assert white is not None and white.name == "White Elder" and white.poses[0] == "u/elder-se-2.png"
    assert types.look("Elder", gender="variation") == types.look("Elder")
    assert types.look("Loop") is None and types.look("nobody") is None


def test_a_campaigns_type_replaces_the_games_for_that_campaign_only() -> None:
    types = UnitTypes([parse(TYPES)])
    own = types.copy()
    own.add([parse("[unit_type]\nid=Elder\nimage=u/mine.png\n[/unit_type]\n")])
    mine, theirs = own.look("Elder"), types.look("Elder")
    assert mine is not None and mine.poses == ("u/mine.png",)
    assert theirs is not None and theirs.poses[0] == "u/elder-se-2.png"


def test_poses_are_limited() -> None:
    actions = "".join(f"[a_anim]\n[frame]\nimage=u/x-{chr(97 + i)}.png\n[/frame]\n[/a_anim]\n" for i in range(26))
    look = UnitTypes([parse(f"[unit_type]\nid=X\nimage=u/x.png\n{actions}[/unit_type]\n")]).look("X")
    assert look is not None and len(look.poses) == MAX_POSES
