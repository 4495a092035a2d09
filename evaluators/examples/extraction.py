"""Two extractions as a service meets them: a date into ISO form, an order into JSON.

    [tasks]
    target = "orders"
    files = ["evaluators/examples/extraction.py:ORDERS", "evaluators/examples/extraction.py:DATES"]

Each prompt has a system message and two worked examples, as production prompts do. The sentences
of the test rows are made from other templates than those of the training rows, so a model that
learnt the templates by heart gains nothing. ``rows`` makes them; the files beside this one hold
what it made.
"""

import json
import random
import re
from collections.abc import Callable
from typing import Any

from evaluators.task import Row, Source, Task, Verdict

# fmt: off
CITIES = [
    "Oslo", "Lima", "Paris", "Delhi", "Cairo", "Quito", "Sofia", "Turin", "Perth", "Leeds",
    "Kyoto", "Accra", "Tunis", "Malmo", "Zagreb", "Boston",
]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]
ITEMS = [
    "pens", "blue mugs", "desk lamps", "paper towels", "garden chairs", "wool socks",
    "green folders", "coffee filters", "phone cases", "bike helmets", "water bottles",
    "tea candles", "kitchen knives", "rain jackets", "notebooks", "fans",
]
NAMES = [
    "Anna Berg", "Tom Reyes", "Li Wei", "Sara Novak", "Omar Haddad", "Ines Costa", "Jon Dahl",
    "Mia Keller", "Raj Patel", "Eva Horvat", "Ben Stone", "Yuki Sato", "Nora Lind", "Paul Martin",
    "Zoe Clark", "Ali Demir",
]
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve",
]
# fmt: on
DATED = {
    "train": [
        "The meeting on {date} was moved.",
        "Invoice 4{n} was issued on {date}.",
        "She was born on {date} in {city}.",
        "Our lease ends on {date}.",
        "Please deliver the parcel by {date}.",
        "The contract was signed on {date} by both sides.",
        "He arrived in {city} on {date}.",
        "Payment of {n} euros is due on {date}.",
        "The new office in {city} opens on {date}.",
        "Your appointment is on {date} at nine.",
        "We last spoke on {date}.",
        "The warranty of order {n} expires on {date}.",
    ],
    "test": [
        "The train to {city} leaves on {date}.",
        "Ticket {n} is valid until {date}.",
        "The concert has been set for {date}.",
        "According to the letter of {date}, the fee is {n} dollars.",
        "The shop in {city} was closed on {date}.",
        "Her passport was renewed on {date}.",
    ],
}
ORDERED = {
    "train": [
        "Hi, I would like {q} {item} sent to {city}. My name is {name}.",
        "Please send {q} {item} to {name} in {city}.",
        "{name} from {city} here, I need {q} {item} please.",
        "Order for {name}: {q} {item}, ship to {city}.",
        "Could you ship {q} {item} to {city}? Thanks, {name}",
        "This is {name}. We want to buy {q} {item} for our office in {city}.",
        "I want {q} {item}, deliver them to {name}, {city}.",
        "{name} wrote: we need {q} {item} in {city} by Friday.",
    ],
    "test": [
        "Good morning, {name} speaking. Put me down for {q} {item}, going to {city}.",
        "To {city}, for {name}: {q} {item}.",
        "Dear shop, {q} {item} should go to our branch in {city}. Regards, {name}",
        "We are out of {item} again! Send {q} to {city} and write {name} on the box.",
    ],
}
ISO = re.compile(r"\d{4}-\d{2}-\d{2}")
MAX_CHARS = 2000  # of the line that is parsed


def rows(task: str, split: str, count: int) -> list[dict[str, Any]]:
    """The rows of a split, "train" or "test": different texts, the same at every call."""
    make = {"dates": _date_row, "orders": _order_row}[task]
    draw, made = random.Random(f"{task} {split}"), dict[str, dict[str, Any]]()
    while len(made) < count:
        row = make(draw, split)
        made.setdefault(row["text"], row)
    return [{"id": f"{split}-{n}", **row} for n, row in enumerate(made.values())]


def _date_row(draw: random.Random, split: str) -> dict[str, Any]:
    year, month, day = draw.randint(1950, 2030), draw.randint(1, 12), draw.randint(1, 28)
    text = draw.choice(DATED[split])
    words = {
        "date": draw.choice(_STYLES)(year, MONTHS[month - 1], day),
        "city": draw.choice(CITIES),
    }
    text = text.format(n=draw.randint(11, 999), **words)
    return {"text": text, "answer": f"{year}-{month:02d}-{day:02d}"}


def _order_row(draw: random.Random, split: str) -> dict[str, Any]:
    quantity = draw.randint(2, 12)
    told = str(quantity) if draw.random() < 0.6 else NUMBERS[quantity]
    order = {
        "item": draw.choice(ITEMS),
        "quantity": quantity,
        "name": draw.choice(NAMES),
        "city": draw.choice(CITIES),
    }
    text = draw.choice(ORDERED[split]).format(q=told, **order)
    return {"text": text, "answer": order}


def _ordinal(day: int) -> str:
    ending = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


_STYLES: tuple[Callable[[int, str, int], str], ...] = (
    lambda year, month, day: f"{day} {month} {year}",
    lambda year, month, day: f"{month} {day}, {year}",
    lambda year, month, day: f"{_ordinal(day)} of {month} {year}",
    lambda year, month, day: f"{month[:3]} {day} {year}",
    lambda year, month, day: f"{day}-{month[:3]}-{year}",
    lambda year, month, day: f"{month} {_ordinal(day)}, {year}",
)


def verify_date(completion: str, row: Row) -> Verdict:
    """Reward 1 where the last ISO date is the one asked for; format 1 for any."""
    found = ISO.findall(completion[-MAX_CHARS:])
    last = found[-1] if found else None
    return Verdict(float(last == row["answer"]), float(last is not None), last)


def verify_order(completion: str, row: Row) -> Verdict:
    """Reward 1 for exactly the order's four values; format 1 for a JSON object on one line."""
    line = completion.strip().split("\n")[0][:MAX_CHARS]
    try:
        value = json.loads(line) if line.count("{") == 1 else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return Verdict(0.0, 0.0, None)
    same = json.dumps(value, sort_keys=True) == json.dumps(row["answer"], sort_keys=True)
    return Verdict(float(same), 1.0, line)


def _fields(row: Row) -> dict[str, str]:
    return {"text": row["text"]}


DATES = Task(
    name="dates",
    source=Source("", train_split="train", eval_split="test", file="dates-{split}.jsonl.gz"),
    key=lambda row: str(row["id"]),
    fields=_fields,
    template="{text}",
    system="You turn dates into ISO form. Answer with the date alone.",
    verify=verify_date,
    gold=lambda row: str(row["answer"]),
    wrong=lambda row: "1900-01-01",
    shots=2,
    target=True,
    format_weight=0.1,
    max_tokens=16,
)
ORDERS = Task(
    name="orders",
    source=Source("", train_split="train", eval_split="test", file="orders-{split}.jsonl.gz"),
    key=lambda row: str(row["id"]),
    fields=_fields,
    template="{text}",
    system="You read orders. Answer with one line of JSON: item, quantity, name and city.",
    verify=verify_order,
    gold=lambda row: json.dumps(row["answer"]),
    wrong=lambda row: json.dumps({**row["answer"], "quantity": 0}),
    shots=2,
    target=True,
    format_weight=0.1,
    max_tokens=48,
)
