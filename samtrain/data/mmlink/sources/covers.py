"""Book covers typeset here: real titles and authors of works in the public domain, no art of anybody's.

A work has several editions, which differ in colours, fonts and layout. What two covers share (the author, the genre
printed on them) is known, so a question about it has a true answer.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from samtrain.data.mini.backgrounds import make_background
from samtrain.data.mmlink.options import DrawnCoversOptions
from samtrain.data.mmlink.records import COVER, Locator, SourcePicture
from samtrain.data.mmlink.sources.listing import Listing, Progress

WIDTH, HEIGHT = 256, 384
_VERSION = 1  # raised when the same work looks different
_FONTS = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic", "STIXGeneralBol")
# genre -> (author, titles)
WORKS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "science fiction": (
        ("Jules Verne", ("From the Earth to the Moon", "Twenty Thousand Leagues under the Sea", "Off on a Comet")),
        (
            "H. G. Wells",
            ("The Time Machine", "The War of the Worlds", "The Invisible Man", "The First Men in the Moon"),
        ),
        ("Mary Shelley", ("Frankenstein", "The Last Man")),
        ("Edgar Rice Burroughs", ("A Princess of Mars", "The Gods of Mars", "At the Earth's Core")),
        ("Edwin A. Abbott", ("Flatland",)),
    ),
    "adventure": (
        ("Robert Louis Stevenson", ("Treasure Island", "Kidnapped", "The Black Arrow", "Catriona")),
        ("Jules Verne", ("Around the World in Eighty Days", "Michael Strogoff", "In Search of the Castaways")),
        ("Alexandre Dumas", ("The Three Musketeers", "Twenty Years After", "The Count of Monte Cristo")),
        ("H. Rider Haggard", ("King Solomon's Mines", "Allan Quatermain", "She", "Montezuma's Daughter")),
        ("Jack London", ("The Call of the Wild", "White Fang", "The Sea-Wolf")),
        ("Daniel Defoe", ("Robinson Crusoe", "Captain Singleton")),
        ("Rafael Sabatini", ("Scaramouche", "The Sea Hawk")),
    ),
    "detective story": (
        ("Arthur Conan Doyle", ("A Study in Scarlet", "The Sign of the Four", "The Hound of the Baskervilles")),
        ("Wilkie Collins", ("The Moonstone", "The Law and the Lady")),
        ("G. K. Chesterton", ("The Innocence of Father Brown", "The Wisdom of Father Brown")),
        ("Agatha Christie", ("The Mysterious Affair at Styles", "The Secret Adversary")),
        ("Gaston Leroux", ("The Mystery of the Yellow Room",)),
        ("Anna Katharine Green", ("The Leavenworth Case", "That Affair Next Door")),
    ),
    "horror": (
        ("Bram Stoker", ("Dracula", "The Lair of the White Worm", "The Jewel of Seven Stars")),
        ("Edgar Allan Poe", ("The Fall of the House of Usher", "The Masque of the Red Death", "The Black Cat")),
        ("Sheridan Le Fanu", ("Carmilla", "Uncle Silas")),
        ("Robert Louis Stevenson", ("Strange Case of Dr Jekyll and Mr Hyde",)),
        ("Horace Walpole", ("The Castle of Otranto",)),
        ("M. R. James", ("Ghost Stories of an Antiquary", "A Thin Ghost and Others")),
    ),
    "children's book": (
        ("Lewis Carroll", ("Alice's Adventures in Wonderland", "Through the Looking-Glass")),
        ("L. Frank Baum", ("The Wonderful Wizard of Oz", "Ozma of Oz", "The Marvelous Land of Oz", "Glinda of Oz")),
        ("Edith Nesbit", ("Five Children and It", "The Railway Children", "The Story of the Amulet")),
        ("Rudyard Kipling", ("The Jungle Book", "Just So Stories")),
        ("Kenneth Grahame", ("The Wind in the Willows", "The Reluctant Dragon")),
        ("Carlo Collodi", ("The Adventures of Pinocchio",)),
        ("Frances Hodgson Burnett", ("The Secret Garden", "A Little Princess", "Little Lord Fauntleroy")),
        ("J. M. Barrie", ("Peter and Wendy", "The Little White Bird")),
    ),
    "romance": (
        ("Jane Austen", ("Pride and Prejudice", "Sense and Sensibility", "Emma", "Persuasion", "Mansfield Park")),
        ("Charlotte Bronte", ("Jane Eyre", "Shirley", "Villette")),
        ("Emily Bronte", ("Wuthering Heights",)),
        ("Thomas Hardy", ("Far from the Madding Crowd", "A Pair of Blue Eyes", "Under the Greenwood Tree")),
        ("E. M. Forster", ("A Room with a View", "Where Angels Fear to Tread")),
        ("Elizabeth Gaskell", ("North and South", "Wives and Daughters")),
    ),
    "historical novel": (
        ("Walter Scott", ("Ivanhoe", "Rob Roy", "Waverley", "Kenilworth", "The Talisman")),
        ("Leo Tolstoy", ("War and Peace", "Hadji Murat")),
        ("Charles Dickens", ("A Tale of Two Cities", "Barnaby Rudge")),
        ("Victor Hugo", ("Ninety-Three", "The Hunchback of Notre-Dame")),
        ("Gustave Flaubert", ("Salammbo",)),
        ("James Fenimore Cooper", ("The Last of the Mohicans", "The Spy", "The Deerslayer")),
        ("Henryk Sienkiewicz", ("Quo Vadis", "With Fire and Sword")),
    ),
    "play": (
        ("William Shakespeare", ("Hamlet", "Macbeth", "Othello", "The Tempest", "King Lear", "Twelfth Night")),
        ("Oscar Wilde", ("The Importance of Being Earnest", "Lady Windermere's Fan", "An Ideal Husband", "Salome")),
        ("Henrik Ibsen", ("A Doll's House", "Hedda Gabler", "Peer Gynt", "The Wild Duck")),
        ("Anton Chekhov", ("The Cherry Orchard", "Three Sisters", "Uncle Vanya", "The Seagull")),
        ("Moliere", ("Tartuffe", "The Misanthrope", "The Miser")),
        ("Sophocles", ("Antigone", "Oedipus the King", "Electra")),
        ("Bernard Shaw", ("Pygmalion", "Arms and the Man", "Candida")),
    ),
    "satire": (
        ("Jonathan Swift", ("Gulliver's Travels", "A Tale of a Tub")),
        ("Voltaire", ("Candide", "Zadig", "Micromegas")),
        ("Mark Twain", ("A Connecticut Yankee in King Arthur's Court", "The Innocents Abroad")),
        ("Nikolai Gogol", ("Dead Souls",)),
        ("William Makepeace Thackeray", ("Vanity Fair", "The Book of Snobs")),
    ),
}


def collect(options: DrawnCoversOptions, *, where: str, cache: Path, progress: Progress) -> Listing:
    """Every edition of every work."""
    listing = Listing("drawn-covers")
    for genre, authors in WORKS.items():
        for author, titles in authors:
            for title in titles:
                for edition in range(options.editions):
                    facts = {"title": title, "author": author, "genre": genre, "edition": edition}
                    member = json.dumps(facts, sort_keys=True)
                    listing.pictures.append(
                        SourcePicture(
                            id=f"covers/{hashlib.sha256(member.encode()).hexdigest()[:16]}",
                            role=COVER,
                            identity=f"covers/{author}",
                            pose=f"{title}, edition {edition}",
                            name=f'"{title}"',
                            category="book cover",
                            caption=f'The cover of "{title}" by {author}.',
                            source="drawn-covers",
                            locator=Locator("drawn", "", member, f"v{_VERSION}"),
                            facts={"title": title, "author": author, "genre": genre},
                        )
                    )
    return listing


def draw_cover(member: str) -> Image.Image:
    """[HEIGHT, WIDTH] RGB from a locator's member."""
    facts = json.loads(member)
    seed = int.from_bytes(hashlib.blake2b(member.encode(), digest_size=8).digest(), "big")
    rng = np.random.default_rng(seed)
    ground, _ = make_background(rng, size=HEIGHT, held_out=bool(rng.random() < 0.5))
    left = int(rng.integers(0, HEIGHT - WIDTH + 1))
    cover = ground.crop((left, 0, left + WIDTH, HEIGHT))
    if rng.random() < 0.5:  # dark covers too
        cover = Image.eval(cover, lambda value: int(value * 0.35))
        ink, paper = (250, 245, 225), (30, 30, 40)
    else:
        ink, paper = (25, 25, 35), (250, 246, 235)
    pen = ImageDraw.Draw(cover)
    name = _FONTS[int(rng.integers(len(_FONTS)))]
    band = int(rng.integers(40, 120))
    if rng.random() < 0.6:  # a panel behind the title
        pen.rectangle((14, band, WIDTH - 14, band + 150), fill=paper, outline=ink, width=int(rng.integers(1, 4)))
    if rng.random() < 0.5:
        pen.rectangle((6, 6, WIDTH - 7, HEIGHT - 7), outline=ink, width=2)
    _write(pen, facts["title"], _font(name, 32), ink, top=band + 8, height=134)
    _write(pen, facts["author"], _font(name, 21), ink, top=HEIGHT - 96, height=50)
    _write(pen, facts["genre"].upper(), _font("DejaVuSans", 13), ink, top=HEIGHT - 36, height=20)
    return cover


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def _write(
    pen: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont,
    ink: tuple[int, int, int],
    *,
    top: int,
    height: int,
) -> None:
    """Centred lines, in the largest size that fits."""
    for size in range(int(font.size), 8, -1):
        font = font.font_variant(size=size)
        lines = _wrapped(pen, text, font)
        if lines and 1.2 * size * len(lines) <= height:
            break
    else:
        lines = [text]
    start = top + (height - 1.2 * size * len(lines)) / 2
    for number, line in enumerate(lines):
        middle = (WIDTH - pen.textlength(line, font=font)) / 2
        pen.text((middle, start + number * 1.2 * size), line, fill=ink, font=font)


def _wrapped(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """The fewest lines that fit the width; none where a word is too long."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and pen.textlength(longer, font=font) <= WIDTH - 40:
            lines[-1] = longer
        elif pen.textlength(word, font=font) <= WIDTH - 40:
            lines.append(word)
        else:
            return []
    return lines
