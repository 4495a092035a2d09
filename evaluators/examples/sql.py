"""An own task to copy: a question about tables, answered by a query that is really run.

The query runs on an SQLite database in memory, built from the row's ``schema``. An authorizer lets
it only read, a progress handler stops it after a bounded number of steps, and the number and size
of results are bounded: the answer is untrusted text. Reward 1 when its rows are the rows of the
row's own ``query`` (in order when that query orders them).
"""

import re
import sqlite3
from contextlib import closing

from evaluators.choice import last_block
from evaluators.task import Row, Source, Task, Verdict

MAX_QUERY_CHARS = 2000
MAX_STEPS = 200_000  # SQLite virtual machine instructions, a few milliseconds
STEPS_PER_CALL = 1000
MAX_ROWS = 1000
MAX_VALUE_BYTES = 10_000

READS = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION})
BUILDS = READS | {
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_UPDATE,
    sqlite3.SQLITE_TRANSACTION,
}
BARRED = frozenset({"load_extension", "randomblob", "random", "zeroblob"})
_FENCED = re.compile(r"\A\s*(?:```(?:sql)?\s*)?(.*?)\s*;?\s*(?:```)?\s*\Z", re.DOTALL)

Results = list[tuple[object, ...]]


def bound(connection: sqlite3.Connection, actions: frozenset[int]) -> None:
    """Only these actions and harmless functions, few steps, small values."""
    calls = iter(range(MAX_STEPS // STEPS_PER_CALL))

    def may(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        barred = action == sqlite3.SQLITE_FUNCTION and str(second).lower() in BARRED
        return sqlite3.SQLITE_DENY if barred or action not in actions else sqlite3.SQLITE_OK

    connection.set_authorizer(may)
    connection.set_progress_handler(lambda: next(calls, None) is None, STEPS_PER_CALL)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_QUERY_CHARS)


def run(schema: str, query: str) -> Results | None:
    """The rows a query gives, None where SQLite refuses it or it is too large."""
    with closing(sqlite3.connect(":memory:")) as connection:
        try:
            bound(connection, BUILDS)
            connection.executescript(schema)
            bound(connection, READS)
            results = connection.execute(query).fetchmany(MAX_ROWS + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError):
            return None
    return results if len(results) <= MAX_ROWS else None


def query_in(completion: str) -> str | None:
    """The last answer block without a code fence and a closing semicolon."""
    block = last_block(completion)
    if block is None or not 0 < len(block) <= MAX_QUERY_CHARS:
        return None
    match = _FENCED.match(block)
    return match[1] if match else None


def same(results: Results, wanted: Results, ordered: bool) -> bool:
    """The same rows; in the same order only where the question asks for one."""
    return results == wanted if ordered else sorted(map(repr, results)) == sorted(map(repr, wanted))


def verify(completion: str, row: Row) -> Verdict:
    """Reward 1 for a query with the right rows; format 1 for one that SQLite runs."""
    query = query_in(completion)
    results = run(row["schema"], query) if query else None
    if query is None or results is None:
        return Verdict(0.0, 0.0, query)
    wanted = run(row["schema"], row["query"])
    ordered = "order by" in str(row["query"]).lower()
    right = wanted is not None and same(results, wanted, ordered)
    return Verdict(float(right), 1.0, query)


TASK = Task(
    name="sql",
    source=Source("", eval_split="train", file="sql.jsonl"),  # one file, split by hash
    key=lambda row: str(row["id"]),
    fields=lambda row: {"schema": row["schema"], "question": row["question"]},
    template="{schema}\n{question}\nReply with one SQLite query in <answer> </answer>.",
    verify=verify,
    gold=lambda row: f"<answer>{row['query']}</answer>",
    wrong=lambda row: "<answer>SELECT 'nothing of the kind'</answer>",
    target=True,
    format_weight=0.1,
    max_tokens=256,
)
