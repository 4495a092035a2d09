"""Held-out rows are recognised in any spelling; rows that differ in a number or a word are not."""

from pathlib import Path

import pytest

from deploy.embedded.rows import up_to
from evaluators.held_out import HeldOut, leaks, row_text, skeleton
from evaluators.loading import rows
from evaluators.tasks import TASKS

PENS = "Ada's shop sells 12 pens a day. How many pens does it sell in 5 days?"
RESPELT = {
    "trailing space": f"{PENS} ",
    "two spaces": PENS.replace("Ada's ", "Ada's  "),
    "no spaces": PENS.replace(" ", ""),
    "line breaks": PENS.replace(" ", "\r\n\t"),
    "no-break spaces": PENS.replace(" ", "\u00a0"),
    "capitals": PENS.upper(),
    "small letters": PENS.lower(),
    "curly quote": PENS.replace("'", "’"),
    "other punctuation": PENS.replace("'", "").replace(".", ";").replace("?", " ..."),
    "HTML entities": PENS.replace("'", "&#39;").replace(" ", "&nbsp;"),
    "zero-width space": PENS.replace("shop", "sh\u200bop"),
    "soft hyphens": PENS.replace("e", "e\u00ad"),
    "word joiner in a number": PENS.replace("12", "1\u20602"),
    "Hangul filler": PENS.replace("shop", "sh\u3164op"),
    "Cyrillic a": PENS.replace("Ada", "Ad\u0430"),
    "many Cyrillic letters": PENS.translate(str.maketrans("aeopcAH", "аеорсАН")),
    "Greek letters": PENS.translate(str.maketrans("oAHa", "οΑΗα")),
    "full width": "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in PENS),
    "mathematical letters": PENS.replace("pens", "𝐩𝐞𝐧𝐬").replace("days", "𝖽𝖺𝗒𝗌"),
    "Arabic digits": PENS.replace("12", "١٢").replace("5", "٥"),
    "combining accents": PENS.replace("a", "a\u0301"),
    "dotless i": PENS.replace("in 5", "ın 5"),
    "l for I, rn for m": PENS.replace("it", "lt").replace("many", "rnany"),
    "O for zero": "The price of 1O pens is 5.",
    "clause before": f"Please help. {PENS}",
    "clause after": f"{PENS} Show each step, please.",
    "clause between": PENS.replace("a day.", "a day. It is a nice shop with 3 doors."),
    "clause within": PENS.replace("shop sells", "shop, which is painted blue, sells"),
    "clause after the first word": PENS.replace("Ada's", "Ada's (the baker's)"),
    "other order": "How many pens does it sell in 5 days? Ada's shop sells 12 pens a day.",
    "a letter missing": PENS.replace("sells", "sels"),
    "in a template": f'Question:\n{PENS}\nThink step by step, then end with "#### number".',
}
OTHERS = [
    PENS.replace("12", "13"),
    PENS.replace("5", "6"),
    PENS.replace("12", "112"),
    PENS.replace("12", "1").replace("5", "25"),
    PENS.replace("12", "5", 1).replace("in 5", "in 12"),
    PENS.replace("12", "1.2"),
    PENS.replace("12", "12,000"),
    PENS.replace("pens", "cups"),
    PENS.replace("Ada's shop", "The bakery"),
    "Ada's shop sells 12 pens a day.",
    "How many pens does it sell in 5 days?",
    "",
    "12 5",
]


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    held = HeldOut()
    held.add(TASKS["gsm8k"], [{"question": PENS}, {"question": "The price of 10 pens is 5."}])
    return held


@pytest.mark.parametrize("sent", RESPELT.values(), ids=RESPELT)
def test_a_held_out_row_is_recognised_however_it_is_spelt(held_out, sent):
    assert held_out.hit(sent).task == "gsm8k"


@pytest.mark.parametrize("sent", OTHERS)
def test_a_row_with_other_numbers_or_words_is_another_row(held_out, sent):
    assert held_out.hit(sent) is None


@pytest.mark.parametrize(
    "sent", ["Numbers: 35 44 19\nTarget: 98", "44, 19 and 35 -> 98", "44 19 35 98"]
)
def test_a_problem_of_numbers_is_known_in_any_order_of_a_field(sent):
    held = HeldOut()
    held.add(TASKS["countdown"], [{"nums": [44, 19, 35], "target": 98}])
    assert held.hit(sent).key == "19,35,44=98"


@pytest.mark.parametrize(
    "sent", ["44 19 98 35", "44 19 36 98", "4 41 93 59 8", "44 19 35", "4 4 19 35 98"]
)
def test_other_numbers_are_another_problem(sent):
    held = HeldOut()
    held.add(TASKS["countdown"], [{"nums": [44, 19, 35], "target": 98}])
    assert held.hit(sent) is None


def test_another_statement_about_the_same_theory_is_another_row():
    theory = "The cow is big. The cow is nice. If something is nice then it is kind."
    held = HeldOut()
    held.add(TASKS["proofwriter"], [{"theory": theory, "question": "The cow is big."}])
    assert held.hit(f"{theory}\nTHE COW IS BIG")
    assert held.hit(f"{theory}\nThe cow is kind.") is None
    assert held.hit(theory) is None


def test_options_may_be_shuffled_but_not_exchanged():
    row = {
        "goal": "Clean a greasy old pan",
        "sol1": "Use some hot water",
        "sol2": "Use some cold milk",
    }
    held = HeldOut()
    held.add(TASKS["piqa"], [row])
    assert held.hit(row_text(TASKS["piqa"], row | {"sol1": row["sol2"], "sol2": row["sol1"]}))
    assert held.hit(row_text(TASKS["piqa"], row | {"sol2": "Use some dry sand"})) is None


def test_other_scripts_are_compared_in_their_own_letters():
    held = HeldOut()
    held.add(
        TASKS["gsm8k"], [{"question": "В корзине лежало 12 яблок, 5 съели. Сколько осталось?"}]
    )
    held.add(
        TASKS["gsm8k"],
        [{"question": "籠には12個のりんごがあり、5個食べました。残りはいくつですか？"}],
    )
    assert held.hit("В КОРЗИНЕ  ЛЕЖАЛО 12 ЯБЛОК; 5 СЪЕЛИ. Сколько осталось?")
    assert held.hit("質問：籠には１２個のりんごがあり ５個食べました。 残りはいくつですか")
    assert held.hit("В корзине лежало 12 груш, 5 съели. Сколько осталось?") is None


def test_rows_without_letters_or_digits_hold_nothing_out():
    held = HeldOut()
    held.add(TASKS["gsm8k"], [{"question": "?!"}, {"question": ""}])
    assert [held.hit(text) for text in ("?!", "", "a")] == [None, None, None]


def test_a_row_added_later_is_held_out_too(held_out):
    held = HeldOut()
    assert held.hit(PENS) is None
    held.add(TASKS["gsm8k"], [{"question": PENS}])
    held.add(TASKS["gsm8k"], [{"question": PENS}])
    assert held.hit(PENS)
    assert len(held) == 1
    assert leaks(held, [PENS, PENS.upper(), OTHERS[0]]) == {"gsm8k": 2}


@pytest.mark.parametrize("text", ["\ud800 a", "\x00", "\U000e0041", "x" * 100_000, "1" * 100_000])
def test_odd_texts_are_looked_up_like_any_other(held_out, text):
    assert held_out.hit(text) is None


def test_a_skeleton_of_a_skeleton_is_the_same():
    first = skeleton(RESPELT["many Cyrillic letters"] + "ﬁ Ⅻ ß ½").text
    assert skeleton(first).text.startswith(first[:40])


@pytest.mark.proof
@pytest.mark.parametrize("name", ["countdown", "gsm8k", "proofwriter"])
def test_training_rows_of_the_embedded_model_are_not_taken_for_held_out_ones(name):
    task, held = TASKS[name], HeldOut()
    held.add(task, up_to(name, "eval", 600, 0))
    assert [r for r in up_to(name, "train", 600, 0) if held.hit(row_text(task, r))] == []
    assert all(held.hit(row_text(task, row).upper()) for row in up_to(name, "eval", 600, 0))


@pytest.mark.proof
def test_real_training_rows_are_not_taken_for_held_out_ones(real_rows: Path | None):
    if real_rows is None:
        pytest.skip("ANCHORAGE_TEST_DATA names no folder: the tasks' real rows are not in the tree")
    held = HeldOut()
    for name in ("countdown", "gsm8k", "proofwriter", "hellaswag", "piqa", "arc_challenge"):
        held.add(TASKS[name], rows(TASKS[name], "eval", data_dir=real_rows))
    for name in ("countdown", "gsm8k", "proofwriter"):
        task = TASKS[name]
        train = [row_text(task, row) for row in rows(task, "train", data_dir=real_rows)]
        assert leaks(held, train) == {}
        tests = [row_text(task, row) for row in rows(task, "eval", data_dir=real_rows)]
        assert leaks(held, [f"Please help.\u00a0{text.upper()}" for text in tests]) == {name: 500}
