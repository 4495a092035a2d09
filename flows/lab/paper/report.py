"""The study's figures from its result files: a row a target and system, and the paper's claims.

A mean over seeds has its t interval (95 %) from three seeds on; that of two is too wide to say
anything. A claim that compares systems is decided on differences between trials of one seed:

    seen          3 seeds or more, all differences have the claimed sign (or size)
    not seen      3 seeds or more, and one has not
    cannot tell   fewer seeds, or a system has not been run
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite, sqrt
from statistics import fmean, stdev
from typing import Any

from scipy import stats

Result = Mapping[str, Any]
Point = Mapping[str, Any]  # one measurement of a trial's curve
LEAST_SEEDS = 3
SUFFERS = 0.02  # of the target, as a share: what the study calls equal


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over seeds and its interval; none with fewer than three."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and t interval of values, one a seed."""
    mean, count = fmean(values), len(values)
    if count < LEAST_SEEDS:
        return Spread(mean, None, None, count)
    half = float(stats.t.ppf(0.975, count - 1)) * stdev(values) / sqrt(count)
    return Spread(mean, mean - half, mean + half, count)


def priors(result: Result, point: Point, what: str = "accuracy") -> float:
    """Mean over the prior tasks of accuracy or kl."""
    target = result["trial"]["target"]
    return fmean(value for name, value in point[what].items() if name != target)


def on_target(result: Result, point: Point, what: str = "accuracy") -> float:
    """Accuracy or kl of the target."""
    return float(point[what][result["trial"]["target"]])


def stopped(result: Result) -> Point:
    """The measurement at which early stopping ends: the first best on rows kept apart for that."""
    best: Point = max(result["curve"], key=lambda point: (point["selection"], -point["generation"]))
    return best


def within_tokens(result: Result, budget: float) -> Point:
    """The last measurement with no more generated tokens than a budget."""
    inside = [point for point in result["curve"] if point["tokens"] <= budget]
    last: Point = inside[-1]
    return last


def grouped(results: Sequence[Result]) -> dict[tuple[str, str], dict[int, Result]]:
    """(target, system) -> seed -> result; ES stopped early is a system of its own."""
    groups: dict[tuple[str, str], dict[int, Result]] = {}
    for each in results:
        trial = each["trial"]
        groups.setdefault((trial["target"], trial["system"]), {})[trial["seed"]] = each
        if trial["system"] == "es" and all(p["selection"] is not None for p in each["curve"]):
            end = stopped(each)
            curve = [p for p in each["curve"] if p["generation"] <= end["generation"]]
            early = {**each, "curve": curve, "tokens": end["tokens"]}
            early["norms"] = each["norms"][: end["generation"] + 1]
            groups.setdefault((trial["target"], "es-stopped"), {})[trial["seed"]] = early
    return groups


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each target and system: shares of accuracy, nats a token of KL."""
    groups = grouped(results)
    budgets: dict[str, float] = {}  # the fewest tokens of a whole trial that generates any
    for (target, system), trials in groups.items():
        for each in trials.values():
            if each["tokens"] and system != "es-stopped":
                budgets[target] = min(budgets.get(target, inf), each["tokens"])
    return [
        _row(target, system, own, budgets.get(target, inf))
        for (target, system), own in groups.items()
    ]


def _row(target: str, system: str, trials: Mapping[int, Result], budget: float) -> dict[str, Any]:
    own = [trials[seed] for seed in sorted(trials)]
    ends = [(each, each["curve"][-1]) for each in own]

    def over(measure: Callable[[Result, Point], float]) -> dict[str, Any]:
        return asdict(spread([measure(each, end) for each, end in ends]))

    anchor = [(each, each["curve"][0]) for each in own]
    equal = [(each, within_tokens(each, budget)) for each in own]
    tasks = list(own[0]["curve"][0]["accuracy"])
    return {
        "target": target,
        "system": system,
        "seeds": sorted(trials),
        "anchor": fmean(on_target(*pair) for pair in anchor),
        "anchor_priors": fmean(priors(*pair) for pair in anchor),
        "on_target": over(on_target),
        "priors": over(priors),
        "tasks": {
            name: asdict(spread([end["accuracy"][name] for _, end in ends])) for name in tasks
        },
        "kl_target": over(lambda each, end: on_target(each, end, "kl")),
        "kl_priors": over(lambda each, end: priors(each, end, "kl")),
        "norm": asdict(spread([each["norms"][-1][1] for each in own])),
        "walk": _ratio([(each["norms"][-1][1], each["norms"][-1][2]) for each in own]),
        "closed": _ratio([(each["norms"][-1][1], each["norms"][-1][3]) for each in own]),
        "generations": [end["generation"] for _, end in ends],
        "tokens": [each["tokens"] for each in own],
        "at_tokens": {
            "tokens": budget if isfinite(budget) else None,
            "on_target": fmean(on_target(*pair) for pair in equal),
            "priors": fmean(priors(*pair) for pair in equal),
        },
    }


def _ratio(pairs: Sequence[tuple[float, float | None]]) -> float | None:
    """Mean of norm / prediction; None where there is no prediction."""
    ratios = [norm / walk for norm, walk in pairs if walk]
    return fmean(ratios) if ratios else None


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of the paper on one target, and what the results say."""

    claim: str
    target: str
    figure: str
    seeds: int
    word: str  # seen, not seen, cannot tell


def claims(results: Sequence[Result]) -> list[Claim]:
    """Every claim of the paper that these systems can bear on, target by target."""
    groups = grouped(results)
    made: list[Claim] = []
    for target in sorted({name for name, _ in groups}):
        by_system = {system: own for (name, system), own in groups.items() if name == target}
        made += _claims(target, by_system)
    return made


def _claims(target: str, groups: Mapping[str, Mapping[int, Result]]) -> list[Claim]:
    """The claims on one target; differences are in points of accuracy unless said."""

    def end(result: Result) -> float:
        return 100 * priors(result, result["curve"][-1])

    def start(result: Result) -> float:
        return 100 * priors(result, result["curve"][0])

    def aim(result: Result) -> float:
        return 100 * on_target(result, result["curve"][-1])

    def kl(which: Callable[..., float]) -> Callable[[Result], float]:
        return lambda result: which(result, result["curve"][-1], "kl")

    def lost(system: str, text: str) -> Claim:
        own = groups.get(system, {})
        return _decided(text, target, [end(r) - start(r) for r in own.values()], -1)

    def against(
        text: str, one: str, other: str, figure: Callable[[Result], float], sign: int,
        unit: str = "points",
    ) -> Claim:  # fmt: skip
        pair = groups.get(one, {}), groups.get(other, {})
        seeds = sorted(pair[0].keys() & pair[1].keys())
        gaps = [figure(pair[0][seed]) - figure(pair[1][seed]) for seed in seeds]
        return _decided(text, target, gaps, sign, unit)

    def recovers(result: Result) -> float:
        """How far the mean of the priors rises again after its lowest, points."""
        values = [100 * priors(result, point) for point in result["curve"]]
        return values[-1] - min(values)

    es = groups.get("es", {})
    return [
        lost("es", "ES loses on the prior tasks"),
        _decided(
            "the loss of ES is a drift: the priors' mean rises again after its lowest by 1 point",
            target, [recovers(r) for r in es.values()], 1, beyond=1,
        ),
        lost("grpo", "GRPO loses on the prior tasks, too"),
        lost("random", "a random walk of the same steps loses on the prior tasks"),
        against("AWD (L2) keeps the prior tasks better than ES", "awd-l2", "es", end, 1),
        _decided(
            "and the target does not suffer: not more than 2 points below ES",
            target, _gaps(groups, "awd-l2", "es", aim), 1, beyond=-100 * SUFFERS,
        ),
        against("four times the members keep the priors better than ES", "es-x4", "es", end, 1),
        _decided(
            "L1 and L2 keep the prior tasks alike (within 2 points)", target,
            [abs(gap) for gap in _gaps(groups, "awd-l1", "awd-l2", end)], -1,
            beyond=-100 * SUFFERS,
        ),
        against("KL of ES on the target is below GRPO's", "es", "grpo", kl(on_target), -1, "nats"),
        against("KL of ES on the priors is above GRPO's", "es", "grpo", kl(priors), 1, "nats"),
        against("AWD (L2) lowers KL on the priors", "awd-l2", "es", kl(priors), -1, "nats"),
        against("ES stopped at the target's peak keeps more", "es-stopped", "es", end, 1),
        *(
            against(f"{text} keep more than equal weights", system, "awd-l2", end, 1)
            for system, text in (("awd-fisher", "Fisher weights"), ("awd-path", "path weights"))
        ),
        _norms("the norm of ES is that of a random walk (Eq. 2) within 5 %", target, es, 2),
        _norms(
            "the norm of AWD (L2) is its closed form within 5 %", target,
            groups.get("awd-l2", {}), 3,
        ),
    ]  # fmt: skip


def _gaps(
    groups: Mapping[str, Mapping[int, Result]],
    one: str,
    other: str,
    figure: Callable[[Result], float],
) -> list[float]:
    """Differences between two systems, seed by seed."""
    pair = groups.get(one, {}), groups.get(other, {})
    seeds = sorted(pair[0].keys() & pair[1].keys())
    return [figure(pair[0][seed]) - figure(pair[1][seed]) for seed in seeds]


def _decided(
    claim: str,
    target: str,
    values: Sequence[float],
    sign: int,
    unit: str = "points",
    beyond: float = 0.0,
) -> Claim:
    """The word on values, one a seed, of which the claim says: sign * value > beyond."""
    if not values:
        return Claim(claim, target, "not run", 0, "cannot tell")
    found = spread(values)
    text = f"{found.mean:+.3g} {unit}"
    if found.low is not None and found.high is not None:
        text += f" ({found.low:+.3g} .. {found.high:+.3g})"
    if found.seeds < LEAST_SEEDS:
        return Claim(claim, target, text, found.seeds, "cannot tell")
    word = "seen" if all(sign * each > beyond for each in values) else "not seen"
    return Claim(claim, target, text, found.seeds, word)


def _norms(claim: str, target: str, trials: Mapping[int, Result], column: int) -> Claim:
    """A closed form against what was measured: of each seed by itself, so that one is enough."""
    last = [each["norms"][-1] for each in trials.values()]
    ratios = [row[1] / row[column] for row in last if row[column]]
    if not ratios:
        return Claim(claim, target, "not run", 0, "cannot tell")
    word = "seen" if all(abs(each - 1) <= 0.05 for each in ratios) else "not seen"
    return Claim(claim, target, f"ratio {fmean(ratios):.3f}", len(ratios), word)


def lambda_rule(results: Sequence[Result], target: str) -> tuple[float, bool] | None:
    """The paper's rule on an ablation: of the lambdas that keep the target, the highest.

    Returns:
        Lambda of L2 and whether it is within 2 points of ES on every seed that both have; the
        lowest tried where none is. None without ES or with fewer than two lambdas.
    """
    groups = grouped(results)
    es, tried = groups.get((target, "es"), {}), dict[float, Mapping[int, Result]]()
    for (name, system), own in groups.items():
        plain, _, lam = system.partition("@")
        if name == target and plain == "awd-l2":
            tried[float(lam) if lam else next(iter(own.values()))["settings"]["sizes"]["lam"]] = own
    if len(tried) < 2 or not es:
        return None
    for strength in sorted(tried, reverse=True):
        shared = sorted(tried[strength].keys() & es.keys())
        gaps = [_last(tried[strength][seed]) - _last(es[seed]) for seed in shared]
        if gaps and min(gaps) >= -SUFFERS:
            return strength, True
    return min(tried), False


def _last(result: Result) -> float:
    return on_target(result, result["curve"][-1])


def markdown(results: Sequence[Result]) -> str:
    """The tables: systems by target, prior tasks, claims."""
    found = rows(results)
    parts = []
    for target in sorted({row["target"] for row in found}):
        own = [row for row in found if row["target"] == target]
        own.sort(key=lambda row: (row["system"] != "es", row["system"]))
        parts.append(_systems_table(target, own))
        parts.append(_tasks_table(target, own))
        rule = lambda_rule(results, target)
        if rule is not None:
            word = "keeps the target within 2 points of ES" if rule[1] else "still costs the target"
            parts.append(f"Lambda by the rule (start high, lower it): {rule[0]:g}, which {word}.\n")
    lines = ["## Claims", "", "| claim | target | figure | seeds | here |", "|---|---|---|---|---|"]
    lines += [
        f"| {c.claim} | {c.target} | {c.figure} | {c.seeds} | {c.word} |" for c in claims(results)
    ]
    return "\n".join([*parts, *lines]) + "\n"


def _systems_table(target: str, own: Sequence[Mapping[str, Any]]) -> str:
    at = own[0]["at_tokens"]["tokens"]
    lines = [
        f"## Target {target}",
        "",
        f"Anchor: target {100 * own[0]['anchor']:.1f} %, mean of the prior tasks "
        f"{100 * own[0]['anchor_priors']:.1f} %. Equal tokens: "
        f"{'none generated' if at is None else f'{at:,}'}.",
        "",
        "| system | seeds | target % | priors % | KL target | KL priors | norm | / Eq. 2 "
        "| / L2 form | generations | tokens | target, priors % at equal tokens |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in own:
        equal = row["at_tokens"]
        cells = [
            row["system"],
            " ".join(map(str, row["seeds"])),
            _percent(row["on_target"]),
            _percent(row["priors"]),
            f"{row['kl_target']['mean']:.3f}",
            f"{row['kl_priors']['mean']:.3f}",
            f"{row['norm']['mean']:.2f}",
            "-" if row["walk"] is None else f"{row['walk']:.3f}",
            "-" if row["closed"] is None else f"{row['closed']:.3f}",
            " ".join(map(str, sorted(set(row["generations"])))),
            f"{fmean(row['tokens']):,.0f}",
            f"{100 * equal['on_target']:.1f}, {100 * equal['priors']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _tasks_table(target: str, own: Sequence[Mapping[str, Any]]) -> str:
    names = list(own[0]["tasks"])
    lines = ["| accuracy % | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in own:
        cells = [_percent(row["tasks"][name]) for name in names]
        lines.append(f"| {row['system']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(value: Mapping[str, Any]) -> str:
    """'56.1 (54.0 .. 58.2)', or the mean alone."""
    text = f"{100 * value['mean']:.1f}"
    if value["low"] is None:
        return text
    return f"{text} ({100 * value['low']:.1f} .. {100 * value['high']:.1f})"
