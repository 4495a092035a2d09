"""Where no bar can be drawn, long work is told in lines, not too many."""

import pytest
from rich.table import Table

from flows.show import terminal
from flows.show.terminal import Bars, pairs, show, visible


@pytest.mark.parametrize(("every", "told"), [(0.0, 3), (3600.0, 0)])
def test_work_in_a_log_is_told_in_lines(
    every: float, told: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY", every)
    with terminal.Bars() as bars:
        advance = bars.track("reading", 3)
        for done in (1, 2, 3):
            advance(done)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "  reading (3)"
    assert [line.split(" after ")[0] for line in lines] == [
        f"  reading: {n}/3" for n in range(1, told + 1)
    ]


TEXTS = ("\x1b]0;evil\x07", "\x1b[2J", "\x9b31m", "a\rb", "\x00", "\u202e")


@pytest.mark.parametrize("text", TEXTS)
def test_a_clients_control_characters_reach_no_terminal(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a cell, a title, a line or what is told of work under way: seen, not obeyed."""
    table = Table(text, title=text)
    table.add_row(text)
    show({}, False, table, pairs(text, {text: text}), f"line {text}")
    with Bars() as bars:
        bars.say(text)
        bars.track(text, 1)(1, text)
    told = "".join(capsys.readouterr())
    assert not set(told) & (set(map(chr, (*range(32), 0x9B, 0x202E))) - {"\n"})
    assert visible(text) in told
