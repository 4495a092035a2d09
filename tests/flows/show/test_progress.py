"""Where no bar can be drawn, long work is told in lines, not too many."""

import pytest

from flows.show import terminal


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
