"""The verifiers of the example tasks: what they accept, and what untrusted text cannot do."""

import time
from pathlib import Path

import pytest

from evaluators.examples import json_answer, sql
from evaluators.task import judge

JSON_ROW = {"id": "j", "question": "?", "answer": {"a": [1, 2], "b": True}}
SCHEMA = "CREATE TABLE t (n INTEGER, w TEXT); INSERT INTO t VALUES (1, 'one'), (2, 'two');"
SQL_ROW = {"id": "s", "schema": SCHEMA, "question": "?", "query": "SELECT w FROM t WHERE n > 0"}
ORDERED = SQL_ROW | {"query": "SELECT w FROM t ORDER BY n DESC"}


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ('{"b": true, "a": [1, 2]}', 1.0),
        ('Here it is:\n  {"a": [1, 2], "b": true}  \nDone.', 1.0),
        ('{"a": [2, 1], "b": true}', 0.0),
        ('{"a": [1, 2], "b": 1}', 0.0),
        ('{"a": [1, 2], "b": true}\n{}', 0.0),
        ('{"a": [1, 2]', 0.0),
        ('the object {"a": [1, 2], "b": true}', 0.0),
        ("[" * 100_000 + "]" * 100_000, 0.0),
        ('{"a": ' * 300 + "1" + "}" * 300, 0.0),
        ("{" + '"a": 1, ' * 500 + '"b": true}', 0.0),
        ('{"a": [1, 2], "b": NaN}', 0.0),
    ],
)
def test_json_answers(completion: str, reward: float) -> None:
    verdict = judge(json_answer.TASK, completion, JSON_ROW)
    assert (verdict.reward, verdict.error) == (reward, None)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("7", 1.0),
        ("It is\n 7 \nas asked.", 1.0),
        ("7\n8", 0.0),
        ("7.0", 0.0),
        ('"7"', 0.0),
        ("[7]", 0.0),
        ("It is 7", 0.0),
        ("٧", 0.0),
        ("1" * 4000 + "\n" + "7" * 2001, 0.0),
        ("-" + "7\n" + "x" * 3998, 0.0),  # the line is cut in two
    ],
)
def test_a_json_answer_may_be_a_plain_value(completion: str, reward: float) -> None:
    verdict = judge(json_answer.TASK, completion, JSON_ROW | {"answer": 7})
    assert (verdict.reward, verdict.error) == (reward, None)


@pytest.mark.parametrize(
    ("query", "reward"),
    [
        ("SELECT w FROM t", 1.0),
        ("SELECT w FROM t ORDER BY n DESC", 1.0),
        ("```sql\nSELECT w FROM t;\n```", 1.0),
        ("SELECT w FROM t WHERE n = 1", 0.0),
        ("SELECT n, w FROM t", 0.0),
        ("SELECT nothing FROM t", 0.0),
        ("SELECT w FROM t; DROP TABLE t", 0.0),
    ],
)
def test_sql_answers_are_judged_by_their_rows(query: str, reward: float) -> None:
    verdict = judge(sql.TASK, f"<answer>{query}</answer>", SQL_ROW)
    assert (verdict.reward, verdict.error) == (reward, None)


def test_sql_order_counts_where_the_question_orders() -> None:
    for query, reward in (("ORDER BY n DESC", 1.0), ("ORDER BY n", 0.0)):
        assert (
            judge(sql.TASK, f"<answer>SELECT w FROM t {query}</answer>", ORDERED).reward == reward
        )


HOSTILE = [
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) SELECT count(*) FROM c",
    "SELECT count(*) FROM t a, t b, t c, t d, t e, t f, t g, t h, t i, t j, t k, t l, t m, t n,"
    " t o, t p, t q, t r, t s, t u, t v, t w, t x, t y, t z",
    "SELECT hex(zeroblob(1000000000))",
    "SELECT replace(hex(zeroblob(5000)), '0', hex(zeroblob(5000)))",
    "SELECT printf('%1000000000s', 'x')",
    "ATTACH DATABASE 'other.db' AS other",
    "PRAGMA writable_schema = 1",
    "SELECT load_extension('x')",
    "INSERT INTO t VALUES (3, 'three')",
    "DELETE FROM t",
    "CREATE TABLE u (x)",
    "VACUUM INTO 'copy.db'",
    "SELECT 1; SELECT 2",
    "SELECT '\ud800'",
    "SELECT \x00",
    "(" * 1900,
    "SELECT " + "1+" * 900 + "1",
    "SELECT w FROM t WHERE w LIKE '" + "%a" * 900 + "'",
]


@pytest.mark.parametrize("query", HOSTILE)
def test_hostile_queries_earn_nothing_and_stay_bounded(
    query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.thread_time()
    verdict = judge(sql.TASK, f"<answer>{query}</answer>", SQL_ROW)
    assert (verdict.reward, verdict.error) == (0.0, None)
    assert time.thread_time() - started < 0.1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("query", [q for q in HOSTILE if q.split()[0] not in ("SELECT", "WITH")])
def test_a_query_that_writes_is_not_run(query: str) -> None:
    assert judge(sql.TASK, f"<answer>{query}</answer>", SQL_ROW).format == 0.0


@pytest.mark.parametrize(
    "schema",
    [
        "ATTACH DATABASE 'other.db' AS other;",
        "CREATE TABLE t (x); INSERT INTO t WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL "
        "SELECT x+1 FROM c) SELECT x FROM c;",
        "PRAGMA journal_mode = DELETE;",
        "CREATE TABLE t (w); CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END;",
        "not SQL",
    ],
)
def test_a_hostile_schema_earns_nothing(
    schema: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"schema": schema, "query": "SELECT 1"}
    assert judge(sql.TASK, "<answer>SELECT 1</answer>", row).reward == 0.0
    assert list(tmp_path.iterdir()) == []
