"""A small game: every file of the kinds that the real one has, with text and drawings of our own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from samtrain.data.mini.stories.stock import (
    STORY_SPLITS,
    TEST,
    TRAIN,
    VALIDATION,
    campaign_split,
    is_held_out_landscape,
)

MAGENTA = (244, 154, 193)  # the average team colour that sprites are painted in
PALETTE = "F49AC1,3F0016,FDE9F1"

MACROS = """#textdomain wesnoth
# Macros of all campaigns.
#define NAMED_UNIT SIDE TYPE X Y ID NAME ## six words
    [unit]
        side={SIDE}
        type={TYPE}
        x,y={X},{Y}
        id={ID}
        name={NAME}
    [/unit]
#enddef
#define DEFENSE_ANIM REACTION BASE
    [defend]
        [frame]
            image={REACTION}:150
        [/frame]
        [frame]
            image={BASE}:50
        [/frame]
    [/defend]
#enddef
#define SAYS ID TEXT
#arg MOOD
calm#endarg
    [message]
        speaker={ID}
        image=portraits/{MOOD}.png
        message={TEXT}
    [/message]
#enddef
"""
UNITS = {
    "Guard": """#textdomain wesnoth-units
[unit_type]
    id=Guard
    name= _ "Guard"
    image="units/people/guard.png"
    {DEFENSE_ANIM "units/people/guard-defend.png" "units/people/guard.png" }
    [attack_anim]
        [missile_frame]
            image="projectiles/stone.png"
        [/missile_frame]
        [frame]
            image="units/people/guard-attack-[1~3].png:[100*3]"
        [/frame]
    [/attack_anim]
    [death]
        [frame]
            image="units/people/guard-die-[1~2].png:[60,60]"
        [/frame]
    [/death]
    [female]
        image="units/people/guard+female.png~RC(magenta>red)"
    [/female]
[/unit_type]
""",
    "Healer": """[unit_type]
    id=Healer
    name= _ "female^Healer"
    image="units/people/healer.png"
    [healing_anim]
        [frame]
            image="units/people/healer-heal.png:100,units/people/healer.png:50"
        [/frame]
    [/healing_anim]
[/unit_type]
""",
    "Ghost": """[unit_type]
    id=Ghost
    image="units/people/nowhere.png"
[/unit_type]
""",
}
SPRITES = (
    *("guard", "guard-defend", "guard-attack-1", "guard-attack-2", "guard-attack-3", "guard-die-1", "guard+female"),
    *("healer", "healer-heal"),
)
MAIN = """#textdomain wesnoth-NUMBER
[campaign]
    id=CAMPAIGN
    name= _ "Tale | of NUMBER"
    define=CAMPAIGN_NUMBER
    [about]
        title= _ "Design"
        [entry]
            name="Ann Author (ann)"
        [/entry]
    [/about]
[/campaign]
#ifdef CAMPAIGN_NUMBER
[binary_path]
    path=data/campaigns/NUMBER
[/binary_path]
[units]
    {campaigns/NUMBER/units}
[/units]
{campaigns/NUMBER/scenarios}
#endif
"""
OWN_UNIT = """[unit_type]
    id=Wanderer
    name= _ "Wanderer"
    image="units/wanderer.png"
[/unit_type]
"""
SCENARIO = """#textdomain wesnoth-NUMBER
[scenario]
    id=first
    map_data="{campaigns/NUMBER/maps/first.map}"
    [side]
        side=1
        type=Guard
        id=Ada
        name= _ "Ada of NUMBER"
    [/side]
    [side]
        side=2
        type=Wanderer
        id="Mar'tin"
        name= _ "Mar’tin"
    [/side]
    [event]
        name=start
        {NAMED_UNIT 1 (Healer) 3 4 Nell ( _ "Nell")}
        [message]
            speaker=narrator
            message= _ "Long ago, in NUMBER..."
        [/message]
        [message]
            speaker=Ada
            message= _ "Who goes there, so <i>late</i> at night in NUMBER?"
        [/message]
        [delay]
            time=500
        [/delay]
        {SAYS "Mar'tin" (_"I’ve come a long way to " + _ "see ""NUMBER"" once more.") MOOD=tired}
        {SAYS Nell ( _ "Then rest; the gates of NUMBER stay shut until dawn.")}
#ifdef HARD
        {SAYS Ada ( _ "No rest at all for anybody on this level.")}
#else
        {SAYS Ada ( _ "I will tell the captain of NUMBER in the morning.")}
#endif
        [message]
            speaker=Nell
            message= _ "Hush!"
        [/message]
    [/event]
[/scenario]
"""


class Game:
    """A game's folder under construction. campaigns: split -> id of the campaign that belongs to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        by_split = {campaign_split(name): name for name in (f"tale{number}" for number in range(200))}
        self.campaigns = {split: by_split[split] for split in STORY_SPLITS}
        by_role = {is_held_out_landscape(view): view for view in (f"landscape-{number}" for number in range(200))}
        self.landscapes = [by_role[True], by_role[False]]

    def write(self, name: str, text: str) -> Path:
        path = self.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def campaign(self, number: str) -> None:
        """A campaign with one unit type and one scenario."""
        folder = f"campaigns/{number}"
        for name, text in (("_main.cfg", MAIN), ("units/Wanderer.cfg", OWN_UNIT), ("scenarios/01_First.cfg", SCENARIO)):
            self.write(f"{folder}/{name}", text.replace("NUMBER", number).replace("CAMPAIGN", number))
        self.write(f"{folder}/maps/first.map", "Gg, Gg\nGg, Gg\n")
        draw_sprite(self.data / folder / "images/units/wanderer.png", seed=99)


def draw_sprite(path: Path, *, seed: int) -> None:
    """72 x 72 RGBA with a figure, its cloak in the team colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", (72, 72), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.ellipse((28, 12, 44, 28), fill=(230, 200 - seed % 50, 170, 255))
    draw.rectangle((24, 28, 48 + seed % 7, 62), fill=(*MAGENTA, 255))
    image.save(path)


def write_game(folder: Path) -> Game:
    game = Game(folder)
    game.write("COPYING.txt", "the licence\n")
    game.write("core/macros/utils.cfg", MACROS)
    game.write("core/units.cfg", "[units]\n    {core/units/people/}\n[/units]\n")
    for name, text in UNITS.items():
        game.write(f"core/units/people/{name}.cfg", text)
    ranges = ("FF0000,FFFFFF,000000,FF0000", "2E419B,FFFFFF,0F0F0F,0000FF")
    colours = [f"[color_range]\n    rgb={rgb}\n    default=yes\n[/color_range]\n" for rgb in ranges]
    game.write("core/team-colors.cfg", "".join(colours) + f"[color_palette]\n    magenta={PALETTE}\n[/color_palette]\n")
    for seed, name in enumerate(SPRITES):
        draw_sprite(game.data / f"core/images/units/people/{name}.png", seed=seed)
    for view in game.landscapes:
        path = game.data / f"core/images/story/{view}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((640, 480)).convert("RGB").save(path)
    for split in (TRAIN, VALIDATION, TEST):
        game.campaign(game.campaigns[split])
    return game


@pytest.fixture
def game(tmp_path: Path) -> Game:
    """A whole game in VERSION/data, as Debian installs it; the test may change it."""
    return write_game(tmp_path / "wesnoth" / "1.16")


@pytest.fixture(scope="session")
def make_game() -> Callable[[Path], Game]:
    return write_game
