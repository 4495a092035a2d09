"""Comparing two models by what they say: probes and fixed continuations. Pure."""

from collections.abc import Sequence

from agent.population.schedule import Logprobs


def largest_difference(
    one: Sequence[Sequence[Logprobs]], other: Sequence[Sequence[Logprobs]]
) -> float:
    """max |log p - log q| over the token ids both list, infinite where their top ids differ.

    one, other: (prompt, position) -> {token id: log p} of the same prompts, k likeliest each.
    Ids at the edge of the top k may differ by a tie; the likeliest may not, nor may fewer than
    half be common.
    """
    if [len(row) for row in one] != [len(row) for row in other]:
        return float("inf")
    pairs = [pair for rows in zip(one, other, strict=True) for pair in zip(*rows, strict=True)]
    return max((_difference(first, second) for first, second in pairs), default=float("inf"))


def _difference(one: Logprobs, other: Logprobs) -> float:
    """The largest difference at one position."""
    common = one.keys() & other.keys()
    if not common or 2 * len(common) < max(len(one), len(other)):
        return float("inf")
    return max(abs(one[token] - other[token]) for token in common)


def kl_per_token(anchor: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> float:
    """Estimate KL(anchor || candidate) per token, in nats.

        KL ~ mean_t ( log p(x_t | x_<t) - log q(x_t | x_<t) ),   x ~ p

    p the anchor, q the candidate, x the continuations drawn from the anchor (``Engine.sample``),
    given as log-probabilities of the same tokens under both. Unbiased; may be below 0 by chance.
    NaN for no tokens: undefined is not zero.
    """
    tokens = sum(map(len, anchor))
    return sum(kl_sums(anchor, candidate)) / tokens if tokens else float("nan")


def kl_sums(anchor: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> list[float]:
    """The sum of log p - log q over each continuation's tokens: what a bootstrap resamples."""
    return [
        sum(p - q for p, q in zip(*rows, strict=True))
        for rows in zip(anchor, candidate, strict=True)
    ]
