"""The ledger as a table."""

from agent.store.ledger import Entry
from flows.show.report import history_table
from flows.show.terminal import show


def test_the_ledger_fits_80_columns_and_shows_a_reason_as_it_was_given(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    why = "worse: [bold]see[/nothing] :warning: " + "and so on " * 30
    entry = Entry(
        7, 0.0, 3, "host:1", "a" * 64, "ROLLED_BACK", why, {"p": 0.01}, "b" * 64, "c" * 64, "h"
    )
    show({}, False, history_table([entry]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(line.strip("│┃").split("│")[-1] for line in lines).split())
    assert "worse: [bold]see[/nothing] :warning: and so on" in text
    assert "p=0.01" in text
    assert f"host:1; {'b' * 12} -> {'c' * 12}" in text
    assert "ROLLED_BACK aaaaaaaaaaaa" in "".join(lines)
