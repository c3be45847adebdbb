"""Text for the demo model: an invented valley, small sums, ordering and short stories.

Everything is generated from the tables below, so the demo model depends on no external data.
A question has the form ``Question: {prompt}\\nAnswer: {reference}``. Whether a question may be
trained on is decided by a hash of the prompt: about 80 % of the prompts are for training, the rest
are shared out between the calibration set and the evaluation set, so the three never meet. A fact
or a sum that is held out in one phrasing occurs in training in others; problems, lists and stories
are held out as a whole.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

TASKS = ("facts", "arithmetic", "word_problems", "ordering", "stories")
TASK_WEIGHTS = (3, 4, 6, 4, 4)  # in training; the item files hold equally many of each
WORLD_SEED = 7

PEOPLE = (
    "Alba Anton Bela Bruno Carla Cyrus Dora Edgar Elsa Felix Greta Hugo Ida Ivan Jonas Juno Kira "
    "Lars Lena Marta Milo Nadia Nils Olga Oscar Petra Quinn Rosa Rufus Selma Silas Tilda Tobias "
    "Ursula Viktor Wanda"
).split()
TOWNS = (
    "Amberford Birchholm Coldwell Duskmoor Elmgate Fernhill Greyport Harrowmill Ivybridge "
    "Larkstead Mossbury Northcliff"
).split()
BEASTS = (
    "glimmerfox stonecrab mistheron emberwolf mooncat thornhare bellfrog saltwhale duskowl "
    "ironbeetle snowmole reedswan"
).split()
COLOURS = "red blue green white black yellow brown grey purple orange".split()
THINGS = "kite drum lamp hat cup boat coat bell book basket key mirror".split()
PLACES = "mill market harbour orchard bridge library forest bakery castle garden".split()
PLACES = [f"the {place}" for place in PLACES]
FRUITS = "pears apples plums nuts eggs cherries carrots figs buns cookies".split()


class Item(NamedTuple):
    """One question with its answer; ``wrong`` are plausible other answers."""

    task: str
    prompt: str
    reference: str
    wrong: tuple[str, ...]


class Sample(NamedTuple):
    """One training text; ``prefix`` characters at its start are context rather than target."""

    text: str
    prefix: int = 0


VALUE_TABLE = """\
trade: baker, weaver, fisher, smith, teacher, potter, gardener, carpenter, miller, tailor, doctor
pet: goat, parrot, hedgehog, pony, tortoise, ferret, raven, rabbit, goose, badger, cat, dog
dish: onion soup, plum cake, fish pie, apple tart, honey bread, pea stew, mushroom rice, nut cake
instrument: violin, flute, drum, harp, cello, trumpet, guitar, piano, clarinet, accordion
river: Alder, Brook, Cray, Dunn, Esk, Fallow, Gild, Hollow, Isen, Lorn, Merrow, Nettle
ware: glass, wool, salt, cheese, bells, paper, honey, boats, lace, cider, candles, rope
landmark: lighthouse, clock tower, windmill, stone bridge, castle, fountain, rose garden, town gate
food: berries, moss, clams, roots, beetles, acorns, reeds, minnows, mushrooms, seeds, snails
lair: a hollow tree, a deep cave, an old barn, a quiet pond, a pine wood, a salt marsh, a warm well
"""
VALUES = {"town": TOWNS, "colour": COLOURS}
VALUES |= {k: v.split(", ") for k, v in (line.split(": ") for line in VALUE_TABLE.splitlines())}
# Per attribute: kind of entity and name, then ways to say it, then ways to ask for it.
PHRASINGS = """\
person town
  {e} lives in {v}. | The home of {e} is in {v}. | {e} has a house in {v}.
  Where does {e} live? | In which town does {e} live? | Which town is the home of {e}?
  {e} lives in which town? | Name the town where {e} lives. | Where is the house of {e}?
person trade
  {e} works as a {v}. | {e} is a {v}. | By trade {e} is a {v}.
  What is the trade of {e}? | What work does {e} do? | What does {e} do for a living?
  Name the trade of {e}. | Which trade did {e} learn? | As what does {e} work?
person pet
  {e} keeps a {v}. | {e} has a {v} as a pet. | The pet of {e} is a {v}.
  Which pet does {e} keep? | What animal does {e} have? | What is the pet of {e}?
  Name the pet of {e}. | Which animal lives with {e}? | {e} keeps which animal?
person dish
  {e} likes to eat {v}. | The favourite dish of {e} is {v}. | {e} loves {v}.
  What does {e} like to eat? | What is the favourite dish of {e}? | Which dish does {e} love?
  Name the favourite dish of {e}. | What should we cook for {e}? | What would {e} order?
person instrument
  {e} plays the {v}. | In the band {e} plays the {v}. | {e} practises the {v}.
  Which instrument does {e} play? | What does {e} play in the band? | Name the instrument of {e}.
  What is the instrument of {e}? | Which instrument does {e} practise? | {e} plays which instrument?
town river
  {e} lies on the river {v}. | The river {v} runs through {e}. | The river of {e} is the {v}.
  Which river runs through {e}? | On which river does {e} lie? | What is the river of {e}?
  Name the river of {e}. | Which river flows past {e}? | What river would you see in {e}?
town ware
  {e} is known for its {v}. | The people of {e} make {v}. | Merchants buy {v} in {e}.
  What is {e} known for? | What do the people of {e} make? | What do merchants buy in {e}?
  Which ware comes from {e}? | Name the best ware of {e}. | For what is {e} famous?
town landmark
  {e} has a famous {v}. | Visitors to {e} look at the {v}. | In {e} stands the {v}.
  Which landmark stands in {e}? | What do visitors look at in {e}? | What should we see in {e}?
  Name the landmark of {e}. | What is the landmark of {e}? | What stands in {e}?
beast food
  The {e} eats {v}. | The {e} feeds on {v}. | A hungry {e} looks for {v}.
  What does the {e} eat? | What does the {e} feed on? | What is the food of the {e}?
  What does a hungry {e} look for? | Name the food of the {e}. | What can you feed to the {e}?
beast lair
  The {e} sleeps in {v}. | The home of the {e} is {v}. | You find the {e} in {v}.
  Where does the {e} sleep? | What is the home of the {e}? | Where do you find the {e}?
  Where does the {e} live? | Name the home of the {e}. | Where should we look for the {e}?
beast colour
  The {e} is {v}. | The fur or shell of the {e} is {v}. | Every {e} is {v}.
  What colour is the {e}? | Which colour does the {e} have? | Name the colour of the {e}.
  What is the colour of the {e}? | The {e} has which colour? | How is the {e} coloured?
"""


class Attribute(NamedTuple):
    """Something known of every entity of a kind, with the ways to say and to ask it."""

    kind: str
    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _read_phrasings(table: str) -> list[Attribute]:
    """Parse the table above: {e} stands for the entity, {v} for the value."""
    lines = iter(table.splitlines())
    attributes = []
    for head in lines:
        kind, name = head.split()
        phrasings = [part.strip() for _ in range(3) for part in next(lines).split("|")]
        said = tuple(p for p in phrasings if "{v}" in p)
        attributes.append(Attribute(kind, name, said, tuple(phrasings[len(said) :])))
    return attributes


ATTRIBUTES = _read_phrasings(PHRASINGS)
ENTITIES = {"person": PEOPLE, "town": TOWNS, "beast": BEASTS}


def _build_world() -> dict[tuple[str, str], str]:
    """Give every entity a value for each attribute, each value about equally often."""
    rng = random.Random(WORLD_SEED)
    world = {}
    for attribute in ATTRIBUTES:
        entities, pool = ENTITIES[attribute.kind], VALUES[attribute.name]
        values = [pool[i % len(pool)] for i in range(len(entities))]
        rng.shuffle(values)
        world.update({(e, attribute.name): v for e, v in zip(entities, values, strict=True)})
    return world


WORLD = _build_world()


def split_of(prompt: str) -> str:
    """Assign a question to training, calibration or evaluation, the same way on every machine."""
    bucket = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) % 100
    return "evaluation" if bucket < 12 else "calibration" if bucket < 20 else "training"


def _near(number: int, rng: random.Random, least: int = 0) -> list[int]:
    """Numbers one could mistake for the right one: off by a little or by ten."""
    candidates = [number + d for d in (-10, -3, -2, -1, 1, 2, 3, 10) if number + d >= least]
    return rng.sample(candidates, 3)


def fact(rng: random.Random) -> Item:
    """Ask one attribute of one entity of the valley."""
    attribute = rng.choices(ATTRIBUTES, [len(ENTITIES[a.kind]) for a in ATTRIBUTES])[0]
    entity = rng.choice(ENTITIES[attribute.kind])
    question = rng.choice(attribute.questions)
    answer = WORLD[entity, attribute.name]
    wrong = tuple(rng.sample([v for v in VALUES[attribute.name] if v != answer], 3))
    return Item("facts", question.format(e=entity), answer, wrong)


def arithmetic(rng: random.Random) -> Item:
    """Ask for a sum, a difference or a product, in one of four phrasings."""
    a, b, operation = rng.randint(1, 15), rng.randint(1, 12), rng.choice("++--x")
    forms = "What is {a} plus {b}?|{a} + {b} = ?|Add {a} and {b}.|Work out {a} plus {b}."
    answer = a + b
    if operation == "-":
        a, answer = a + b, a
        forms = "What is {a} minus {b}?|{a} - {b} = ?|Take {b} from {a}.|Work out {a} minus {b}."
    elif operation == "x":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        answer = a * b
        forms = "What is {a} times {b}?|{a} x {b} = ?|Multiply {a} by {b}.|Work out {a} times {b}."
    prompt = rng.choice(forms.split("|")).format(a=a, b=b)
    wrong = tuple(str(n) for n in _near(answer, rng))
    return Item("arithmetic", prompt, str(answer), wrong)


def word_problem(rng: random.Random) -> Item:
    """Tell a one-step or two-step counting story about two people."""
    n, m = rng.sample(PEOPLE, 2)
    w = rng.choice(FRUITS)
    a, b, c = rng.randint(4, 15), rng.randint(2, 12), rng.randint(2, 9)
    low, high = sorted((a, b if b != a else b + 1))
    few = min(low, 9)
    problems = (
        (f"{n} has {a} {w}. {m} gives {n} {b} more. How many {w} does {n} have now?", a + b),
        (f"{n} has {high} {w} and loses {low}. How many {w} are left?", high - low),
        (f"{n} sells {low} of {high} {w}. How many {w} are left?", high - low),
        (f"{n} has {a} {w} and {m} has {b}. How many {w} do they have together?", a + b),
        (f"{n} has {high} {w}, {m} has {low}. How many more {w} does {n} have?", high - low),
        (
            f"{n} has {high} {w}, eats {few} and finds {c}. How many {w} has {n} now?",
            high - few + c,
        ),
        (f"{n} fills {c} baskets with {few} {w} each. How many {w} is that?", c * few),
    )
    text, answer = rng.choice(problems)
    if answer < 2:  # "1 pears" would be bad English
        return word_problem(rng)
    wrong = tuple(f"{wrong} {w}" for wrong in _near(answer, rng, least=2))
    return Item("word_problems", text, f"{answer} {w}", wrong)


# Per kind of ordering: the question, and how to get from the list to the answer.
ORDERINGS: dict[str, tuple[str, Callable[[list], list]]] = {
    "again": ("Say this list again: {}.", list),
    "backwards": ("Say this list backwards: {}.", lambda listed: listed[::-1]),
    "first": ("Which word is first: {}?", lambda listed: listed[:1]),
    "second": ("Which word is second: {}?", lambda listed: listed[1:2]),
    "last": ("Which word is last: {}?", lambda listed: listed[-1:]),
    "alphabet": ("Put these names in alphabetical order: {}.", sorted),
    "smallest first": ("Sort these numbers, smallest first: {}.", sorted),
    "largest first": (
        "Sort these numbers, largest first: {}.",
        lambda listed: sorted(listed)[::-1],
    ),
    "smallest": ("Which number is the smallest: {}?", lambda listed: [min(listed)]),
    "largest": ("Which number is the largest: {}?", lambda listed: [max(listed)]),
}


def _list_for(kind: str, rng: random.Random) -> list:
    """Something to put in order: names, numbers or words."""
    length = 4 if kind in ("smallest", "largest", "first", "second", "last") else 3
    if kind == "alphabet":
        return rng.sample(PEOPLE, length)
    return rng.sample(range(1, 40) if "est" in kind else THINGS, length)


def ordering(rng: random.Random) -> Item:
    """Repeat, reverse or sort a short list, or find one element of it."""
    kind = rng.choice(list(ORDERINGS))
    question, arrange = ORDERINGS[kind]
    listed = _list_for(kind, rng)
    answer = arrange(listed)
    orders = [list(order) for order in itertools.permutations(listed, len(answer))]
    wrong = rng.sample([order for order in orders if order != answer], 3)
    prompt = question.format(", ".join(map(str, listed)))
    shown = [" ".join(map(str, order)) for order in (answer, *wrong)]
    return Item("ordering", prompt, shown[0], tuple(shown[1:]))


# Each story: the text, a question for the friend, the place and the thing, in that order.
STORIES = """\
{n} took {thing} and went to {p}. At noon {n} ate {f} with {m}.
  Who ate with {n}? | Where did {n} go? | What did {n} take along?
{n} met {m} at {p}. There they found {thing}. Later {n} ate {f}.
  Whom did {n} meet? | Where did {n} meet {m}? | What did they find?
{m} gave {n} {thing}. In the evening {n} ran to {p} and ate {f}.
  Who gave {n} something? | Where did {n} run to? | What did {m} give to {n}?
""".splitlines()


def _scene(rng: random.Random) -> tuple[dict[str, str], str, list[str]]:
    """The details of one story, its text, and its questions for friend, place and thing."""
    n, m = rng.sample(PEOPLE, 2)
    c, t = rng.choice(COLOURS), rng.choice(THINGS)
    details = {"n": n, "m": m, "p": rng.choice(PLACES), "f": rng.choice(FRUITS), "c": c, "t": t}
    details["thing"] = _a(f"{c} {t}")
    text, questions = rng.choice(list(zip(STORIES[::2], STORIES[1::2], strict=True)))
    return details, text.format(**details), questions.split("|")


def story(rng: random.Random) -> Item:
    """Tell a short story and ask for a detail that only the story gives."""
    details, text, questions = _scene(rng)
    gifts = [_a(f"{rng.choice(COLOURS)} {thing}") for thing in THINGS]
    kinds = (
        ("m", questions[0], PEOPLE),
        ("p", questions[1], PLACES),
        ("thing", questions[2], gifts),
        ("f", "What did {n} eat?", FRUITS),
        ("c", "What colour was the {t}?", COLOURS),
    )
    asked, question, pool = rng.choice(kinds)
    answer = details[asked]
    wrong = tuple(_at(v) for v in rng.sample([v for v in pool if v != answer], 3))
    prompt = f"{text} {question.strip().format(**details)}"
    return Item("stories", prompt, _at(answer), wrong)


def _a(word: str) -> str:
    """The word with its article."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _at(value: str) -> str:
    return f"at {value}" if value in PLACES else value


MAKERS = dict(zip(TASKS, (fact, arithmetic, word_problem, ordering, story), strict=True))


def portrait(rng: random.Random) -> Sample:
    """Running text: a few statements about one person, town or beast."""
    kind = rng.choices(("person", "town", "beast"), (3, 1, 1))[0]
    entity = rng.choice(ENTITIES[kind])
    known = [a for a in ATTRIBUTES if a.kind == kind]
    chosen = rng.sample(known, rng.randint(1, 3))
    said = (rng.choice(a.statements).format(e=entity, v=WORLD[entity, a.name]) for a in chosen)
    return Sample(" ".join(said))


def tale(rng: random.Random) -> Sample:
    """Running text: a story, then sentences that say again what happened."""
    details, text, _ = _scene(rng)
    endings = "{n} was at {p}.|{n} ate {f}.|The {t} was {c}.|{m} was with {n}.|There was {thing}."
    told = " ".join(rng.sample(endings.split("|"), 4)).format(**details)
    return Sample(f"{text} {told}", len(text))


def lists(rng: random.Random) -> Sample:
    """Running text: a list of words, names or numbers, and what can be said about it."""
    listed = _list_for(rng.choice(["again", "alphabet", "largest first"]), rng)
    kinds = ["again", "backwards", "first", "last", "smallest first", "largest first"]
    if isinstance(listed[0], str):
        kinds = ["again", "backwards", "first", "last", "alphabet"]
    rng.shuffle(kinds)
    told = [f"{kind}: {' '.join(map(str, ORDERINGS[kind][1](listed)))}." for kind in kinds[:4]]
    head = f"The list is {', '.join(map(str, listed))}."
    return Sample(f"{head} {' '.join(told)}", len(head))


def sums(rng: random.Random) -> Sample:
    """Running text: a line of sums with their results, none of them held out."""
    lines: list[str] = []
    while len(lines) < 4:
        item = arithmetic(rng)
        if item.prompt.endswith(" = ?") and split_of(item.prompt) == "training":
            lines.append(item.prompt.replace("?", f"{item.reference}."))
    return Sample(" ".join(lines))


def _items(split: str, per_task: int, seed: int) -> list[dict[str, object]]:
    """Draw distinct held-out questions, tasks in turn; every other one is multiple choice."""
    rng = random.Random(seed)
    items: list[dict[str, object]] = []
    seen: set[str] = set()
    for number in range(per_task):
        for task in TASKS:
            item = MAKERS[task](rng)
            while split_of(item.prompt) != split or item.prompt in seen:
                item = MAKERS[task](rng)
            seen.add(item.prompt)
            line: dict[str, object] = {"task": task}
            line |= {"prompt": item.prompt, "reference": item.reference}
            if number % 2 == 0:
                line["choices"] = rng.sample([item.reference, *item.wrong], 4)
            items.append(line)
    return items


def calibration_items(per_task: int = 32) -> list[dict[str, object]]:
    """Questions for choosing which layers to remove."""
    return _items("calibration", per_task, 101)


def healing_items(per_task: int = 600) -> list[dict[str, object]]:
    """Questions for repairing the model; of the kind it was trained on."""
    return _items("training", per_task, 303)


def evaluation_items(per_task: int = 40) -> list[dict[str, object]]:
    """Questions for measuring what the removal cost."""
    return _items("evaluation", per_task, 202)


def render(prompt: str, reference: str) -> Sample:
    """The one rendering of a question with its answer."""
    head = f"Question: {prompt}\nAnswer:"
    return Sample(f"{head} {reference}", len(head))


def training_samples(seed: int, running_text: float = 0.4) -> Iterator[Sample]:
    """An endless stream: questions of the training split, mixed with running text."""
    rng = random.Random(seed)
    while True:
        if rng.random() < running_text:
            yield rng.choice((portrait, tale, sums, lists))(rng)
            continue
        task = rng.choices(TASKS, TASK_WEIGHTS)[0]
        item = MAKERS[task](rng)
        if split_of(item.prompt) == "training":
            yield render(item.prompt, item.reference)
