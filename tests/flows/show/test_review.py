"""The page of a version: what to do in every state, what was learnt and lost, answers as data."""

import json

import pytest

from agent.store.ledger import ALLOWED
from flows.show.report import RoundReport
from flows.show.review import (
    Standing,
    examples,
    gain_lines,
    markdown,
    moved_rows,
    what_to_do,
)

DIGEST = "d" * 64


def head(state, *, verdict="promote", served=False, manual=False):
    return what_to_do(Standing(DIGEST, state, verdict, served, manual, "/homes/mine"))


def test_a_waiting_version_names_tag_and_command_and_their_effects():
    text = head("AWAIT_REVIEW", manual=True)
    assert text.startswith("## What to do\n\nIt waits for a review: it passed the gate.")
    for word in ("approve", "reject"):
        assert f"`anchorage.review` to `{word}`" in text
        command = f'`anchorage review {word} {"d" * 12} --reason "..." --home /homes/mine`'
        assert command in text
    assert "alias `champion`" in text
    assert "served by a hot swap" in text
    assert "never served; the champion stays" in text


def test_where_mlflow_does_not_say_who_signed_in_only_commands_count():
    standing = Standing(DIGEST, "AWAIT_REVIEW", "promote", False, True, "/homes/mine", signs=False)
    text = what_to_do(standing)
    assert "`anchorage review approve" in text
    assert "signed in" not in text
    assert "the tag" not in text
    assert "alias" not in text


def test_a_held_version_is_approved_by_the_tag_and_not_by_the_alias():
    text = head("AWAIT_REVIEW", verdict="hold", manual=True)
    assert "did not pass the gate" in text
    assert "set the alias `champion`" not in text


@pytest.mark.parametrize(
    ("state", "options", "said"),
    [
        ("PASSED", {}, "`anchorage promote dddddddddddd --home /homes/mine`"),
        ("PASSED", {"manual": True}, "about to be put up for review"),
        ("HOLD", {"verdict": "hold"}, "the gate could not tell"),
        ("REJECT", {"verdict": "reject"}, "never served"),
        ("BAKING", {"served": True}, "is served and watched"),
        ("CHAMPION", {"served": True}, "`anchorage rollback --home /homes/mine`"),
        ("CHAMPION", {}, "`anchorage promote dddddddddddd --home /homes/mine`"),
        ("ANCHOR", {}, "was served before"),
        ("ROLLED_BACK", {}, "was rolled back"),
    ],
)
def test_every_state_says_what_can_be_done(state, options, said):
    assert said in head(state, **options)


def test_no_state_of_the_ledger_is_without_words():
    heads = {state: head(state, served=state in ("SWAPPED", "BAKING")) for state in ALLOWED}
    assert all(text.startswith("## What to do\n\n") for text in heads.values())
    assert not [state for state, text in heads.items() if text.endswith("Nothing.")]


ROW = {"n": 100, "anchor": 0.4, "champion": 0.4, "candidate": 0.6, "outcome": "pass"}


def sample(name, reward, text, task="gsm8k"):
    chat = [{"role": "system", "content": "short"}, {"role": "user", "content": f"ask {name}"}]
    row = {"task": task, "example_id": name, "reward": reward, "completion": text}
    return row | {"prompt": json.dumps(chat), "example": json.dumps({"answer": f"gold {name}"})}


def gold(row):
    return json.loads(row["example"])["answer"]


@pytest.mark.parametrize(
    ("figures", "answer"),
    [
        ({"difference": 0.2, "low": 0.1, "high": 0.3}, "Yes."),
        ({"difference": 0.02, "low": -0.1, "high": 0.1}, "Not shown."),
        ({"difference": -0.2, "low": -0.3, "high": -0.1}, "No, it lost."),
        ({"difference": None, "low": None, "high": None}, "Nothing was compared."),
    ],
)
def test_it_says_whether_it_learnt_with_effect_and_idle_generations(figures, answer):
    tasks = {"gsm8k": ROW | figures | {"role": "target"}}
    told = RoundReport("0001-gsm8k", "gsm8k", 3, "completed", "d" * 64, "hold", (), tasks)
    text = markdown(told, [{"no_op": None}, {"no_op": "no spread"}, {"no_op": None}], "")
    assert f"**Did it learn?** {answer} gsm8k: 40.0 % -> 60.0 %" in text
    assert "**What did it lose?** No prior task fell against the anchor." in text
    assert "3 generations (1 without a step)" in text
    if figures["low"] is not None:
        assert f"({100 * figures['low']:+.1f} .. {100 * figures['high']:+.1f})" in text


def test_it_says_how_much_traffic_was_used_and_set_aside():
    tasks = {"gsm8k": ROW | {"difference": 0.2, "low": 0.1, "high": 0.3, "role": "target"}}
    rows = {"rows": 24, "from_traffic": 2, "set_aside": {"over_cap": 25, "gate": 0, "refused": 1}}
    rows["leaks"] = {"piqa": 3}
    report = RoundReport("0001-gsm8k", "gsm8k", 3, "ended", "d" * 64, "hold", (), tasks, rows=rows)
    line = "24 training prompts, 2 sent by clients; requests set aside: 25 over_cap, 1 refused."
    line += " Prompts that hold rows that judge: 3 of piqa."
    assert line in markdown(report, [], "")
    assert report.to_json()["rows"] == rows


def test_it_says_what_the_gain_is_made_of_and_what_it_cost():
    gain = {
        "n": 100, "accuracy": (0.4, 0.6), "alike": 80, "alike_accuracy": (0.45, 0.475),
        "format": (0.7, 0.99), "truncated": (0.2, 0.0), "tokens": (30.0, 12.0),
        "fixed": 25, "broken": 5, "tokens_spent": 2_000_000,
    }  # fmt: skip
    lines = "\n".join(gain_lines(gain))
    assert "Rows fixed: 25, broken: 5." in lines
    assert "right format: 70.0% -> 99.0%, cut at the limit: 20.0% -> 0.0%" in lines
    assert "mean length: 30.0 -> 12.0 tokens" in lines
    assert "Among the 80 rows whose answers kept format and length: 45.0% -> 47.5%." in lines
    assert "2,000,000 tokens: +10.0 points a million." in lines
    assert gain_lines({}) == []
    assert len(gain_lines({**gain, "alike_accuracy": None, "tokens": None, "tokens_spent": 0})) == 1


def test_it_says_which_prior_tasks_fell_and_by_how_much():
    target = ROW | {"difference": 0.2, "low": 0.1, "high": 0.3, "role": "target"}
    fell = {"difference": -0.02, "low": -0.04, "high": 0.0, "role": "prior", "b": 3, "c": 1}
    rose = fell | {"difference": 0.01}
    tasks = {"gsm8k": target, "arc": ROW | fell, "piqa": ROW | rose}
    report = RoundReport("0001-gsm8k", "gsm8k", 3, "ended", DIGEST, "promote", (), tasks)
    line = "**What did it lose?** arc -2.0 (-4.0 .. +0.0) points (3 rows lost, 1 won): pass."
    assert line in markdown(report, [], "")


def test_fixed_and_broken_rows_stand_side_by_side_as_data():
    before = [sample("a", 0, "# shout"), sample("b", 1, "fine"), sample("c", 1, "same")]
    after = [sample("a", 1, "| good |"), sample("b", 0, "<b>bad"), sample("c", 1, "same")]
    target = moved_rows(before, after, gold)
    lost = moved_rows([sample("p", 1, "yes", "piqa")], [sample("p", 0.5, "no", "piqa")], gold)
    text = examples(target, lost)
    for title in ("## Fixed: 1", "## Broken: 1", "## Broken in prior tasks: 1"):
        assert title in text
    for row in ("a", "b", "p"):
        assert text.index(f"    ask {row}") < text.index(f"    gold {row}")
    assert text.index("    gold a") < text.index("    # shout") < text.index("    | good |")
    assert text.index("    | good |") < text.index("    <b>bad")
    assert "anchor, reward 1:" in text
    assert "candidate, reward 0.5:" in text
    assert "same" not in text
    assert not [line for line in text.splitlines() if line.startswith(("# ", "|", "<"))]


def test_long_answers_are_cut_and_only_the_first_rows_are_shown():
    before = [sample(str(i), 0, "x" * 5000) for i in range(9)]
    after = [sample(str(i), 1, "right") for i in range(9)]
    text = examples(moved_rows(before, after, gold), [], most=2)
    assert "## Fixed: 9" in text
    assert text.count("question:") == 2
    assert "... (5000 characters)" in text
    assert len(text) < 4000
