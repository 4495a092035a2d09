"""Recipes compared: equal answers, paired seeds, one small file a trial that is made once."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.errors import UserError
from agent.sections import LearnerSettings
from flows.lab.bench.learning import (
    SYSTEMS,
    LearningBench,
    bench_learning,
    changes,
    learning_table,
    plot_learning,
    report,
)
from flows.lab.trials import PairedRun
from flows.session import Session
from flows.show.terminal import Reporter, Silent

BENCH = LearningBench("embedded", ("gsm8k",), ("ours", "published"), 1, 384, 60)
PROFILE = LearnerSettings(sigma=0.01, alpha=0.01, population=16, prompts=512, batch=32)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_asks_at_least_the_answers_and_less_than_a_generation_more(
    system: str,
) -> None:
    made = changes(PROFILE, PairedRun("m", "t", system, 3), 8192)
    chosen = LearnerSettings(**PROFILE.model_dump() | made)
    a_generation = chosen.population * min(chosen.batch or chosen.prompts, chosen.prompts)
    assert 8192 <= a_generation * chosen.generations < 8192 + a_generation
    assert chosen.seed == 3


def test_an_unknown_system_is_refused(tmp_path: Path) -> None:
    bench = LearningBench("embedded", ("gsm8k",), ("best",))
    with pytest.raises(UserError, match="'best' is not known; allowed: ours, published"):
        bench_learning(bench, None, tmp_path, tmp_path, Silent())


@pytest.mark.proof
def test_a_trial_leaves_a_file_and_is_not_run_again(
    planted_in: Callable[..., Session], tmp_path: Path
) -> None:
    begun: list[Path] = []

    @contextmanager
    def opened(root: Path, progress: Reporter) -> Iterator[Session]:
        begun.append(root)
        session = planted_in(root, progress)
        yield session
        session.close()

    def run() -> dict[str, Any]:
        config = tmp_path / "few.toml"
        config.write_text(
            '[learner]\npopulation = 8\nprompts = 24\n[tasks]\npriors = ["countdown", "piqa"]\n'
        )
        work, out = tmp_path / "work", tmp_path / "out"
        return bench_learning(BENCH, config, work, out, Silent(), opened)

    document = run()
    assert [path.name for path in begun] == [f"embedded-gsm8k-{s}-1" for s in BENCH.systems]
    ours, published = (
        next(each for each in document["trials"] if each["trial"]["system"] == system)
        for system in BENCH.systems
    )
    assert ours["answers"] == 384
    assert published["answers"] == 30 * 96  # all training rows that this home opens
    assert ours["tokens"] == 3 * 384  # the planted answers have three tokens each
    assert ours["tasks"].keys() == {"gsm8k", "countdown", "piqa"}
    gained = ours["tasks"]["gsm8k"]
    assert gained["n"] == 60
    after, before = gained["accuracy"][1], gained["accuracy"][0]
    assert gained["fixed"] - gained["broken"] == round(60 * (after - before))
    assert run() == document
    assert len(begun) == 2
    file = tmp_path / "out" / "embedded-gsm8k-ours-1.json"
    assert file.stat().st_size < 200_000
    file.write_text("{")
    with pytest.raises(UserError, match=r"embedded-gsm8k-ours-1\.json: is damaged"):
        report(tmp_path / "out", "embedded")
    assert run()["systems"] == document["systems"]
    assert len(begun) == 3


def result(system: str, seed: int, after: float, tokens: int) -> dict[str, Any]:
    task = {"accuracy": (0.2, after), "alike_accuracy": (0.3, 0.31), "p": 0.001}
    prior = {"accuracy": (0.5, 0.49), "p": 0.5}
    trial = {"model": "m", "target": "t", "system": system, "seed": seed}
    return {"trial": trial, "tokens": tokens, "tasks": {"t": task, "u": prior}}


def test_the_report_pairs_seeds_and_needs_no_model(tmp_path: Path) -> None:
    for seed, gained in ((1, 0.3), (2, 0.4)):
        for system, after, tokens in (("ours", gained, 1000), ("published", 0.22, 2000)):
            path = tmp_path / f"m-t-{system}-{seed}.json"
            path.write_text(json.dumps(result(system, seed, after, tokens)))
    document = report(tmp_path, "m")
    ours = document["systems"][0]
    assert ours["system"] == "ours"
    assert ours["points"] == pytest.approx([10.0, 20.0])
    assert ours["points_alike"] == pytest.approx([1.0, 1.0])
    assert ours["points_per_million_tokens"] == pytest.approx(15_000)
    assert ours["ratio_to_published"] == pytest.approx(15.0)  # 10 and 20 times: the median
    assert ours["priors"] == pytest.approx(-1.0)
    assert learning_table(document).row_count == 2
    assert plot_learning(document, tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("model", ["smollm2", "embedded"])
def test_the_committed_results_are_those_of_the_documents(model: str) -> None:
    root = Path(__file__).parents[4]
    page = (root / "docs" / "learning.md").read_text()
    results = report(root / "docs" / "results", model)["trials"]
    assert results
    for each in results:
        target = each["trial"]["target"]
        before, after = (f"{100 * share:.1f}" for share in each["tasks"][target]["accuracy"])
        who = f"| {target} | {each['trial']['system']} | {each['trial']['seed']} | "
        assert f"{who}{each['tasks'][target]['n']} | {before} | {after} |" in page
        assert f"| {each['tokens']:,} | " in page
        assert f"| {each['reliability']:.2f} | " in page
