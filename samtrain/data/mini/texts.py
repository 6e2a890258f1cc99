"""What is asked and how it is answered.

Every question form has its own answer form, so that answers vary in wording but a reader of the question knows which
wording is due: what a model must find out is the content. `{image#1}` is literal text, as in the authors' prompts.
"""

from samtrain.data.mini.vocabulary import Kind, is_plural, phrase

PLACES = ("top left", "top right", "bottom left", "bottom right", "centre")

# (question, answer). {a}: the thing with its article; {s}: the verb's ending after it; {are}: is or are.
_COMMON: tuple[tuple[str, str], ...] = (
    ("Sum up the common factor in these pictures.", "{A} appear{s} in every picture."),
    ("What do all of these pictures have in common?", "They all have {a} in them."),
    ("Name the object that every picture shows.", "Every picture shows {a}."),
    ("Which single thing can be found in each of the images?", "It is {a} that can be found in each image."),
    ("Please describe the element that is visible in all pictures.", "The element visible in all pictures is {a}."),
    ("What is shared by these images?", "These images share {a}."),
    ("Can you pinpoint the same object in all the pictures?", "Yes, there {are} {a} in all of them."),
    ("Look at the pictures and tell what keeps coming back.", "{A} keep{s} coming back."),
)
# {k}: "a bird", {ks}: "birds".
_CATEGORY: tuple[tuple[str, str], ...] = (
    ("What kind of thing appears in every picture?", "{K} appears in every picture."),
    ("Which category do all of these pictures have in common?", "The category they have in common is {ks}."),
    ("The pictures show different things of one kind. Which kind?", "They all show {ks}."),
    ("Name the kind of thing that each image contains.", "Each image contains {k}."),
    ("Sum up in one category what all the pictures share.", "All the pictures share one category: {ks}."),
    ("What sort of thing can be found in all of the images?", "{Ks} can be found in all of the images."),
)
# {n}: the invented name, {p}: the place, {b}: the neighbour with its article.
_LINKING: tuple[tuple[str, str], ...] = (
    ("Where is {n}, and what is beside {n}?", "{n} is at the {p}, beside {b}."),
    ("Tell me where {n} is and what is next to it.", "{n} is at the {p}, next to {b}."),
    ("What is {n} close to, and in which part of the picture?", "{n} is close to {b}, at the {p}."),
    ("Find {n}. Which part of the picture is it in, and what is nearest to it?", "At the {p}; nearest to it: {b}."),
)
# Followed by the captions that are given; all but the last picture have one.
_STORY: tuple[str, ...] = (
    "The pictures tell a story. Continue it with the caption of the last picture.",
    "Given the captions of the first pictures, write the caption of the last one.",
    "Read what is said in the first pictures, and write what is said in the last one.",
    "Complete this picture story: what is the last caption?",
)
NUM_COMMON, NUM_CATEGORY, NUM_LINKING, NUM_STORY = len(_COMMON), len(_CATEGORY), len(_LINKING), len(_STORY)

# Invented: sounds that English words do not have together, so that no text prior helps.
_ONSETS = ("Zav", "Quol", "Vex", "Jorv", "Yazz", "Kwem", "Xil", "Wobr", "Thrav", "Ngal", "Vlod", "Zhur")
_ENDINGS = ("ika", "orou", "ubbe", "anoo", "eqi", "ulva")
NAMES = tuple(onset + ending for onset in _ONSETS for ending in _ENDINGS)


def common_texts(label: str, form: int) -> tuple[str, str]:
    """(question, answer) of group captioning where one thing is shared."""
    question, answer = _COMMON[form % NUM_COMMON]
    thing = phrase(label)
    plural = is_plural(label)
    return question, answer.format(A=_capital(thing), a=thing, s="" if plural else "s", are="are" if plural else "is")


def category_texts(kind: Kind, form: int) -> tuple[str, str]:
    """(question, answer) where the pictures share a kind of thing."""
    question, answer = _CATEGORY[form % NUM_CATEGORY]
    return question, answer.format(K=_capital(kind.singular), k=kind.singular, Ks=_capital(kind.plural), ks=kind.plural)


def linking_texts(*, name: str, place: str, neighbour: str, asked: int, num_images: int, form: int) -> tuple[str, str]:
    """(prompt, answer) of cued linking; picture 1 introduces `name`, picture `asked` (1-based) is asked about."""
    question, answer = _LINKING[form % NUM_LINKING]
    question = question.format(n=name)
    if num_images > 2:
        question = f"In picture {asked}: {question[0].lower()}{question[1:]}"
    pictures = "".join(f"{{image#{number}}}" for number in range(2, num_images + 1))
    prompt = f"{{image#1}}Caption#1: This is {name}.{pictures}{question}"
    return prompt, answer.format(n=name, p=place, b=phrase(neighbour))


def story_texts(lines: tuple[str, ...], *, form: int) -> tuple[str, str]:
    """(prompt, answer) of a story: the authors' form for AESOP and VIST, the last line is the answer."""
    *given, last = lines
    captions = "".join(f"{{image#{number}}}Caption#{number}:{line}" for number, line in enumerate(given, start=1))
    number = len(lines)
    return f"{_STORY[form % NUM_STORY]}{captions}{{image#{number}}}Caption#{number}:", last


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
