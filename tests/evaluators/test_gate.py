"""The six steps of the gate, one behaviour a test."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest

from agent.sections import GateSettings
from evaluators import gate
from evaluators.comparison import pooled_margin, task_margin
from evaluators.gate import POOLED, GateRules, Sample, Tables

LEVELS = {"alpha": 0.025, "target_alpha": 0.01, "min_gain": 0.005}
PRIORS = ("arc", "countdown", "hellaswag", "mmlu", "piqa", "proofwriter")
ROWS = 300
RIGHT = dict.fromkeys(PRIORS, ROWS) | {"countdown": 135, "gsm8k": 168}


def table(changes=None, *, digest="", prefix="r", rows=ROWS, right=RIGHT):
    """All tasks; ``changes``: task -> (lost, won) against the anchor."""
    return _table(tuple((changes or {}).items()), digest, prefix, rows, tuple(right.items()))


@cache
def _table(changes, digest, prefix, rows, right):
    samples = []
    for task, count in right:
        lost, won = dict(changes).get(task, (0, 0))
        for i in range(rows):
            correct = lost <= i < count + won
            samples.append(Sample(task, f"{prefix}{i}", float(correct), "harness", digest))
    return tuple(samples)


def tables(changes=None, **options):
    changes = {"gsm8k": (10, 70)} | (changes or {})
    return Tables(
        table(digest="A", **options),
        table(digest="B", **options),
        table(changes, digest="C", **options),
    )


def rules(**changes):
    return GateRules(**{**LEVELS, "margins": {}, "sequential": False, **changes})


def decide(judged, target, settings=None, sealed=None):
    return gate.decide(judged, target, settings or rules(), sealed)


def found(decision, step, task=None, stage="first"):
    (reason,) = [
        r
        for r in decision.reasons
        if r.step == step and r.stage == stage and task in (None, r.task)
    ]
    return reason


# -- margins --------------------------------------------------------------------------------


def test_margins_of_the_design():
    assert [task_margin(n) for n in (500, 1000, 2000)] == [0.05, 0.035, 0.025]
    assert [pooled_margin(n) for n in (3000, 6000, 12000)] == [0.0125] * 3


def test_fewer_rows_have_wider_margins_up_to_ten_points():
    for margin in (task_margin, pooled_margin):
        widths = [margin(n) for n in range(1, 4000)]
        assert widths == sorted(widths, reverse=True)
        assert widths[0] == 0.10
        assert widths[100] > widths[-1]
        with pytest.raises(ValueError, match="0 rows"):
            margin(0)


# -- verdicts -------------------------------------------------------------------------------


def test_a_gain_without_harm_is_promoted_and_says_that_nothing_confirmed_it():
    decision = decide(tables({"arc": (3, 0), "countdown": (15, 12)}), "gsm8k")
    assert decision.verdict == "promote"
    assert "first stage alone" in found(decision, "confirmation").text
    gain = found(decision, "target")
    assert (gain.baseline, gain.n, gain.b, gain.c) == ("champion", ROWS, 10, 70)
    assert gain.difference == pytest.approx(0.2)
    assert found(decision, "pooled").n == 6 * ROWS


@pytest.mark.parametrize("lost", [15, 30, 90])
def test_a_loss_of_5_to_30_points_is_rejected_naming_task_and_bound(lost):
    decision = decide(tables({"piqa": (lost, 0)}), "gsm8k")
    assert decision.verdict == "reject"
    reason = found(decision, "prior", "piqa")
    assert reason in decision.decisive()
    assert reason.outcome == "reject"
    assert -lost / ROWS < reason.bound < 0
    assert "piqa" in reason.text
    assert f"bound {100 * reason.bound:+.2f}" in reason.text
    assert decision.tasks["piqa"]["candidate"] == pytest.approx(1 - lost / ROWS)


def test_many_small_losses_show_in_the_pool_alone():
    decision = decide(tables(dict.fromkeys(PRIORS, (6, 0))), "gsm8k")
    assert [r.task for r in decision.decisive()] == [POOLED]
    assert decision.verdict == "reject"
    assert all(found(decision, "prior", task).outcome == "pass" for task in PRIORS)


def test_a_loss_that_is_not_shown_and_not_ruled_out_is_held():
    decision = decide(tables({"countdown": (40, 28)}), "gsm8k")
    assert decision.verdict == "hold"
    reason = found(decision, "prior", "countdown")
    assert reason.low < -reason.margin < reason.high
    assert "more rows" in reason.text


@pytest.mark.parametrize(
    ("change", "rows", "verdict", "words"),
    [
        ((0, 0), ROWS, "hold", "b + c = 0"),
        ((12, 16), ROWS, "hold", "no gain shown"),
        ((60, 10), ROWS, "reject", "a loss is shown"),
        ((30, 20), 2000, "reject", "no gain worth a swap"),
    ],
)
def test_a_target_that_did_not_gain(change, rows, verdict, words):
    right = {"arc": rows, "piqa": rows, "gsm8k": rows // 2}
    decision = decide(tables({"gsm8k": change}, rows=rows, right=right), "gsm8k")
    assert decision.verdict == verdict
    assert words in found(decision, "target").text


def test_a_sure_gain_below_the_least_is_no_gain():
    rows = 4000
    right = {"arc": rows, "gsm8k": 2000}
    decision = decide(tables({"gsm8k": (0, 19)}, rows=rows, right=right), "gsm8k")
    gain = found(decision, "target")
    assert gain.p < 0.01
    assert gain.difference < 0.005
    assert gain.outcome == "hold"


def test_the_target_is_compared_with_the_champion_and_not_with_the_anchor():
    given = tables()
    champion = table({"gsm8k": (8, 66)}, digest="B")  # it has learnt nearly as much already
    decision = decide(replace(given, champion=champion), "gsm8k")
    assert decision.verdict == "hold"
    assert (found(decision, "target").b, found(decision, "target").c) == (2, 4)


def test_harm_outweighs_what_cannot_be_told():
    decision = decide(tables({"gsm8k": (0, 0), "arc": (60, 0)}), "gsm8k")
    assert {r.outcome for r in decision.reasons} >= {"hold", "reject"}
    assert decision.verdict == "reject"


def test_too_few_rows_cannot_pass_whatever_the_margin():
    right = dict.fromkeys(PRIORS, 30) | {"gsm8k": 0}
    decision = decide(tables({"gsm8k": (0, 30)}, rows=30, right=right), "gsm8k")
    assert decision.verdict == "hold"
    assert found(decision, "prior", "arc").outcome == "hold"


# -- special tasks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "verdict"),
    [((0, 0), "promote"), ((1, 0), "hold"), ((1, 5), "hold"), ((40, 0), "reject")],
)
def test_zero_tolerance(change, verdict):
    settings = rules(zero_tolerance=frozenset({"countdown"}), pooled=0.2)
    assert decide(tables({"countdown": change}), "gsm8k", settings).verdict == verdict


def test_an_own_margin_replaces_the_rule():
    changed = tables({"countdown": (22, 18)})
    assert decide(changed, "gsm8k").verdict == "promote"
    strict = decide(changed, "gsm8k", rules(margins={"countdown": 0.02}))
    assert strict.verdict == "hold"
    assert found(strict, "prior", "countdown").margin == 0.02


def test_a_retained_task_keeps_what_it_had_gained():
    given = tables({"countdown": (2, 3)})
    champion = table({"countdown": (0, 60)}, digest="B")
    gained = replace(given, champion=champion)
    assert decide(gained, "gsm8k").verdict == "promote"
    kept = decide(gained, "gsm8k", rules(retained=frozenset({"countdown"})))
    assert kept.verdict == "reject"
    assert found(kept, "retained").baseline == "champion"


def test_graded_rewards_are_judged_by_betting_and_refused_unasked():
    half = tables()
    candidate = tuple(
        replace(s, reward=0.5) if s.task == "arc" and s.example_id in ("r1", "r2") else s
        for s in half.candidate
    )
    half = replace(half, candidate=candidate)
    refused = decide(half, "gsm8k")
    assert refused.verdict == "hold"
    assert "neither 0 nor 1" in refused.reasons[0].text
    graded = decide(half, "gsm8k", rules(graded=frozenset({"arc"})))
    assert found(graded, "prior", "arc").method == "betting"
    assert found(graded, "prior", "arc").difference == pytest.approx(-1 / ROWS)
    assert found(graded, "prior", "piqa").method == "score"


def graded_tables(change, row=lambda i: 0.25 + i % 3 / 4):
    """gsm8k graded, each row of the candidate better or worse by ``change``."""
    given = tables({"gsm8k": (0, 0)})

    def scored(samples, by=0.0):
        return tuple(
            replace(s, reward=min(1.0, max(0.0, row(int(s.example_id[1:])) + by)))
            if s.task == "gsm8k"
            else s
            for s in samples
        )

    return Tables(scored(given.anchor), scored(given.champion), scored(given.candidate, change))


@pytest.mark.parametrize(
    ("change", "verdict"), [(0.15, "promote"), (0.0, "hold"), (-0.1, "reject")]
)
def test_a_graded_target_is_promoted_held_and_rejected(change, verdict):
    decision = decide(graded_tables(change), "gsm8k", rules(graded=frozenset({"gsm8k"})))
    assert decision.verdict == verdict
    assert found(decision, "target").method == "betting"
    before, after = (decision.tasks["gsm8k"][who] for who in ("champion", "candidate"))
    assert found(decision, "target").difference == pytest.approx(after - before)


@pytest.mark.parametrize(("change", "outcome"), [(-0.02, "pass"), (-0.3, "reject")])
def test_a_graded_prior_keeps_its_margin(change, outcome):
    settings = rules(graded=frozenset({"gsm8k"}))
    decision = decide(graded_tables(change), "arc", settings)
    assert found(decision, "prior", "gsm8k").outcome == outcome
    assert found(decision, "prior", "gsm8k").method == "betting"


def clustered(given, size):
    def grouped(samples):
        return tuple(replace(s, cluster=f"t{int(s.example_id[1:]) // size}") for s in samples)

    return Tables(grouped(given.anchor), grouped(given.champion), grouped(given.candidate))


def test_rows_of_few_templates_cannot_carry_what_as_many_single_rows_can():
    given = tables({"countdown": (6, 6)})
    single = decide(clustered(given, 1), "gsm8k", rules(pooled=0.2))
    assert single.verdict == "promote"
    few = decide(clustered(given, 30), "gsm8k", rules(pooled=0.2))
    assert few.verdict == "hold"
    assert found(few, "prior", "arc").method == "betting"


def test_a_sequential_gate_may_be_asked_again_with_more_rows():
    settings = rules(sequential=True, margins={"countdown": 0.065}, pooled=0.0161)
    changes = {"countdown": (15, 12)}
    assert decide(tables(changes), "gsm8k", settings).verdict == "hold"
    right = {task: 3 * count for task, count in RIGHT.items()}
    changes = {"countdown": (45, 36), "gsm8k": (30, 210)}
    extended = decide(tables(changes, rows=3 * ROWS, right=right), "gsm8k", settings)
    assert extended.verdict == "promote"
    assert {r.method for r in extended.reasons} == {"betting", None}


# -- completeness ---------------------------------------------------------------------------


def edit(given, name, change):
    """One table changed by ``change(list of samples) -> list``."""
    return replace(given, **{name: tuple(change(list(getattr(given, name))))})


def without(task):
    return lambda rows: [s for s in rows if s.task != task]


def first(**change):
    return lambda rows: [replace(rows[0], **change), *rows[1:]]


EVERY = ("anchor", "champion", "candidate")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[1:], "1 of 300 rows missing: r0"),
        (lambda rows: [*rows, rows[5]], "rows more than once: r5"),
        (lambda rows: [], "n = 0"),
        (without("piqa"), "piqa: {}: no rows of this task (n = 0)"),
        (without("gsm8k"), "gsm8k: {}: no rows of this task (n = 0)"),
        (first(reward=math.nan), "r0 = nan"),
        (first(reward=math.inf), "r0 = inf"),
        (first(reward=2.0), "r0 = 2"),
        (first(harness_hash="other"), "different harness hashes: harness, other"),
        (first(digest="other"), "several digests"),
        (first(cluster="t1"), "different clusters: r0"),
    ],
)
def test_tables_that_are_not_whole_are_held_with_the_reason(name, change, words):
    decision = decide(edit(tables(), name, change), "gsm8k")
    assert decision.verdict == "hold"
    text = "\n".join(r.text for r in decision.reasons)
    assert words.format(name) in text
    assert name in text or "harness" in words
    assert {r.step for r in decision.reasons} == {"completeness"}
    json.dumps(decision.to_json(), allow_nan=False)


def test_a_digest_other_than_the_recorded_one_is_held():
    given = replace(tables(), digests={"candidate": "C", "anchor": "A"})
    assert decide(given, "gsm8k").verdict == "promote"
    moved = decide(replace(given, digests={"candidate": "D"}), "gsm8k")
    assert moved.verdict == "hold"
    assert "candidate: digest changed: recorded D, now C" in moved.reasons[0].text


def test_the_rows_of_the_draw_and_no_others():
    draw = {task: frozenset(f"r{i}" for i in range(ROWS)) for task in RIGHT}
    given = replace(tables(), expected=draw)
    assert decide(given, "gsm8k").verdict == "promote"
    shrunk = Tables(*(samples[2:] for _, samples in given.named()), expected=draw)
    assert decide(shrunk, "gsm8k").verdict == "hold"
    grown = {task: rows - {"r7"} for task, rows in draw.items()}
    extra = decide(replace(given, expected=grown), "gsm8k")
    assert extra.verdict == "hold"
    assert "not drawn: r7" in extra.reasons[0].text
    missing = decide(replace(given, expected=draw | {"safety": frozenset({"s1"})}), "gsm8k")
    assert missing.verdict == "hold"
    assert "safety" in missing.reasons[0].text


def test_without_prior_tasks_forgetting_cannot_be_ruled_out():
    given = tables(right={"gsm8k": 168})
    decision = decide(given, "gsm8k")
    assert decision.verdict == "hold"
    assert "no prior task" in decision.reasons[0].text


def test_nothing_at_all_is_held():
    decision = decide(Tables((), (), ()), "gsm8k")
    assert decision.verdict == "hold"
    assert decision.tasks["gsm8k"]["candidate"] is None


def test_ids_are_data_in_messages():
    evil = first(example_id="\x1b[2J" + "x" * 1000)
    decision = decide(edit(tables(), "candidate", evil), "gsm8k")
    text = "\n".join(r.text for r in decision.reasons)
    assert "\x1b" not in text
    assert len(max(text.splitlines(), key=len)) < 300


# -- confirmation ---------------------------------------------------------------------------


def test_a_sealed_draw_confirms_at_the_level_that_is_left():
    decision = decide(tables(), "gsm8k", sealed=tables(prefix="s"))
    assert decision.verdict == "promote"
    sealed = [r for r in decision.reasons if r.stage == "sealed"]
    assert {r.step for r in sealed} == {"prior", "pooled"}
    assert sealed[0].alpha == pytest.approx(0.025 * 6 / math.pi**2)
    late = decide(tables(), "gsm8k", rules(confirmation=1000), tables(prefix="s"))
    assert late.verdict == "hold"


def test_harm_on_the_sealed_draw_rejects():
    sealed = tables({"arc": (30, 0)}, prefix="s")
    decision = decide(tables(), "gsm8k", sealed=sealed)
    assert decision.verdict == "reject"
    assert found(decision, "prior", "arc", "sealed").outcome == "reject"
    assert "sealed draw" in found(decision, "prior", "arc", "sealed").text


def test_a_candidate_that_failed_never_touches_the_sealed_draw():
    sealed = tables({"piqa": (99, 0)}, prefix="s")
    decision = decide(tables({"arc": (60, 0)}), "gsm8k", sealed=sealed)
    assert {r.stage for r in decision.reasons} == {"first"}


@pytest.mark.parametrize(
    ("sealed", "words"),
    [
        (tables(), "already used in the first stage"),
        (edit(tables(prefix="s"), "candidate", lambda rows: rows[1:]), "missing"),
        (edit(tables(prefix="s"), "anchor", without("piqa")), "no rows"),
        (
            edit(
                tables(prefix="s"), "candidate", lambda rows: [replace(s, digest="D") for s in rows]
            ),
            "digest changed before confirmation: recorded C, now D",
        ),
        (Tables((), None, ()), "no rows"),
    ],
)
def test_a_broken_sealed_draw_is_held(sealed, words):
    decision = decide(tables(), "gsm8k", sealed=sealed)
    assert decision.verdict == "hold"
    assert words in "\n".join(r.text for r in decision.decisive())


def test_a_sealed_draw_needs_the_champion_only_for_retained_tasks():
    sealed = replace(tables(prefix="s"), champion=None)
    assert decide(tables(), "gsm8k", sealed=sealed).verdict == "promote"
    settings = rules(retained=frozenset({"arc"}))
    assert decide(tables(), "gsm8k", settings, sealed).verdict == "hold"


# -- the document ---------------------------------------------------------------------------


def test_the_document_is_plain_and_checkable():
    document = json.loads(json.dumps(decide(tables(), "gsm8k").to_json(), allow_nan=False))
    assert set(document) == {"verdict", "reasons", "tasks"}
    assert set(document["tasks"]) == set(RIGHT)
    row = document["tasks"]["gsm8k"]
    assert (row["role"], row["n"], row["anchor"]) == ("target", ROWS, pytest.approx(0.56))
    judged = [r for r in document["reasons"] if r["step"] in ("prior", "pooled", "target")]
    assert len(judged) == len(PRIORS) + 2
    for reason in judged:
        numbers = ("n", "b", "c", "difference", "low", "high", "bound", "margin", "p")
        assert all(isinstance(reason[name], int | float) for name in numbers)


def test_the_settings_give_the_levels_of_the_design():
    assert GateRules.of(GateSettings()) == rules()


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 0.0},
        {"alpha": 0.6},
        {"target_alpha": -1},
        {"min_gain": 0.0},
        {"pooled": 1.5},
        {"margins": {"arc": 5}},
        {"margins": {"arc": math.nan}},
        {"confirmation": 0},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"alpha|share|confirmation"):
        rules(**wrong)
