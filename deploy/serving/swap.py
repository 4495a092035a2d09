"""Changing the served weights: the protocol alone, as generators of steps; no socket, no file.

In place, one engine:

    preflight -> lease -> intent -> hold the gateway -> pause -> load -> resume -> verify -> stamp
    -> record -> release

The engine is resumed before it is verified, because a paused engine answers nothing; until the
gateway is released only the probes reach it. Whoever drives a protocol performs each step and
throws its failure back in (``run``). What follows a failure depends on what may be loaded then:

    before the pause             nothing was touched: release
    in the pause                 the old weights: resume, release
    from the load to the record  unknown or unwanted weights: kill, cold start on the old, release
    in the release               the new weights, verified: the watchdog will open the gateway
    lease lost                   the watchdog settles the swap: touch nothing

Cold, for an engine that is dead, hung or holds unknown weights:

    preflight -> lease -> intent -> stamp -> hold the gateway -> kill, start -> record -> release

Nothing of it needs the engine to work before. From the stamp on there is no way back but another
swap: a controller that dies is finished by the watchdog, on the target.

On trial, a second engine starts, is verified and gets a share; the old version is served on.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

from deploy.serving.lease import LeaseLostError
from deploy.serving.served import Served


@dataclass(frozen=True, slots=True)
class Preflight:
    """Refuse a directory that may not be loaded, before anything is touched.

    ``probes``: recorded answers are needed too, to verify by; a cold start is what they record.
    """

    target: Served
    probes: bool = True


@dataclass(frozen=True, slots=True)
class Begin:
    """Take the lease: from here a deadline runs. ``alive``: the engine has to answer for it."""

    previous: Served
    target: Served
    alive: bool = True


@dataclass(frozen=True, slots=True)
class Intent:
    """Record in the ledger what is about to happen: a swap, or a trial."""

    target: Served
    trial: bool = False


@dataclass(frozen=True, slots=True)
class Hold:
    """Admit no request to the engine; ``wait`` for those inside."""

    wait: bool = True


@dataclass(frozen=True, slots=True)
class Pause:
    """Stop the scheduler and drop cached prefixes."""


@dataclass(frozen=True, slots=True)
class Load:
    """Put the target's weights into the engine."""

    target: Served


@dataclass(frozen=True, slots=True)
class Resume:
    """Let the engine answer again, behind a gateway that still holds."""


@dataclass(frozen=True, slots=True)
class StartOther:
    """Bring up a second engine on the target; one that is warm with it is used as it is."""

    target: Served


@dataclass(frozen=True, slots=True)
class Verify:
    """Compare the engine's answers to the probes with a cold engine's."""

    target: Served


@dataclass(frozen=True, slots=True)
class Stamp:
    """From now on every start serves the target."""

    target: Served


@dataclass(frozen=True, slots=True)
class StampCold:
    """From now on every start serves the target, and the engine that runs is to be killed."""

    target: Served


@dataclass(frozen=True, slots=True)
class StartCold:
    """Kill the engine and start it on what is stamped."""

    target: Served


@dataclass(frozen=True, slots=True)
class Swapped:
    """Record in the ledger that the target is served."""

    target: Served


@dataclass(frozen=True, slots=True)
class Release:
    """Open the gateway with this version."""

    served: Served


@dataclass(frozen=True, slots=True)
class Flip:
    """Send new requests to this version's engine; on trial, a share of them."""

    served: Served
    trial: bool = False


@dataclass(frozen=True, slots=True)
class Drain:
    """Wait for those inside the other version's engine."""

    previous: Served


@dataclass(frozen=True, slots=True)
class StopOther:
    """End an engine that gets no requests."""

    served: Served


@dataclass(frozen=True, slots=True)
class Recover:
    """Kill the engine and start it cold on this version."""

    previous: Served


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Record in the ledger that the target is not served, and why."""

    target: Served
    reason: str


@dataclass(frozen=True, slots=True)
class End:
    """Give the lease back."""


Step = (
    Preflight
    | Begin
    | Intent
    | Hold
    | Pause
    | Load
    | Resume
    | StartOther
    | Verify
    | Stamp
    | StampCold
    | StartCold
    | Swapped
    | Release
    | Flip
    | Drain
    | StopOther
    | Recover
    | RolledBack
    | End
)


@dataclass(frozen=True, slots=True)
class SwapOutcome:
    """What is served after a swap, and why it is not the target where it is not."""

    swapped: bool
    served: Served
    reason: str = ""


Protocol = Generator[Step, None, SwapOutcome]


def in_place(previous: Served, target: Served) -> Protocol:
    """Reload the one engine. See the module."""
    yield Preflight(target)
    yield from _begin(previous, target)
    touched = "nothing"
    try:
        yield Hold()
        touched = "scheduler"
        yield Pause()
        touched = "weights"
        yield Load(target)
        yield Resume()
        yield Verify(target)
        yield Stamp(target)
        yield Swapped(target)
    except LeaseLostError:
        raise
    except Exception as fault:
        yield from _undo(previous, touched)
        left = yield from _open(previous, RolledBack(target, str(fault)))
        return SwapOutcome(False, previous, f"{fault}{left}")
    left = yield from _open(target)
    return SwapOutcome(True, target, left)


def blue_green(previous: Served, target: Served, *, keep_warm: bool = True) -> Protocol:
    """Start a second engine (``target.slot``), verify it, send new requests there.

    Running answers end where they began. ``keep_warm``: the old engine stays up, so that the way
    back is a flip.
    """
    if target.slot == previous.slot:
        raise ValueError(f"slot: {target.slot} serves already; allowed: the other one")
    yield Preflight(target)
    yield from _begin(previous, target)
    stamped = False
    try:
        yield StartOther(target)
        yield Verify(target)
        # The ledger before stamp and flip: where it refuses the record (another controller has a
        # newer epoch) the old engine still serves and nothing has to be taken back.
        yield Swapped(target)
        stamped = True  # before the attempt: a stamp that failed may have been written
        yield Stamp(target)
        yield Flip(target)
    except LeaseLostError:
        raise
    except Exception as fault:
        if stamped:
            yield Stamp(previous)
            yield Flip(previous)
        return (yield from _given_up(previous, target, fault))
    yield Drain(previous)
    if not keep_warm:
        yield StopOther(previous)
    yield End()
    return SwapOutcome(True, target)


def on_trial(previous: Served, target: Served) -> Protocol:
    """Start a second engine (``target.slot``), verify it, give it a share of the requests.

    Taken again it goes on with a trial whose controller, engine or gateway was lost.
    """
    yield Preflight(target)
    yield from _begin(previous, target, trial=True)
    try:
        yield StartOther(target)
        yield Verify(target)
        yield Flip(target, trial=True)
    except LeaseLostError:
        raise
    except Exception as fault:
        return (yield from _given_up(previous, target, fault))
    yield End()
    return SwapOutcome(True, previous, "on trial")


def _given_up(previous: Served, target: Served, fault: Exception) -> Protocol:
    """End the second engine, which answers nobody."""
    yield StopOther(target)
    yield RolledBack(target, str(fault))
    yield End()
    return SwapOutcome(False, previous, str(fault))


def cold(previous: Served, target: Served) -> Protocol:
    """Start the engine anew on the target; a gateway that is down reads the stamp when it starts.

    What fails after the stamp is raised: the lease stays, and the watchdog goes on trying.
    """
    yield Preflight(target, probes=False)
    yield from _begin(previous, target, alive=False)
    yield StampCold(target)
    try:
        yield Hold(wait=False)
    except LeaseLostError:
        raise
    except Exception as fault:
        held = f"; the gateway did not hold: {fault}"
    else:
        held = ""
    yield StartCold(target)
    yield Swapped(target)
    left = yield from _open(target)
    return SwapOutcome(True, target, f"by a cold start{held}{left}")


def run(protocol: Protocol, perform: Callable[[Step], None]) -> SwapOutcome:
    """Drive a protocol to its end. What ``perform`` raises is the protocol's to handle."""
    try:
        step = next(protocol)
        while True:
            try:
                perform(step)
            except Exception as fault:
                step = protocol.throw(fault)
            else:
                step = next(protocol)
    except StopIteration as end:
        outcome: SwapOutcome = end.value
        return outcome


def _begin(
    previous: Served, target: Served, *, alive: bool = True, trial: bool = False
) -> Generator[Step, None, None]:
    """The lease, then the ledger; a ledger that refuses gives the lease back."""
    yield Begin(previous, target, alive)
    try:
        yield Intent(target, trial)
    except Exception:
        yield End()
        raise


def _undo(previous: Served, touched: str) -> Generator[Step, None, None]:
    """Bring the engine back to the old weights, by the cheapest way that is certain."""
    if touched == "nothing":
        return
    if touched == "scheduler":
        try:
            yield Resume()
        except LeaseLostError:
            raise
        except Exception:
            touched = "weights"
    if touched == "weights":
        yield Recover(previous)


def _open(served: Served, *records: Step) -> Generator[Step, None, str]:
    """Open the gateway; when it cannot be reached, the lease stays for the watchdog to end.

    ``records`` come before the lease is given back: until then no other controller writes the
    ledger.
    """
    left = ""
    try:
        yield Release(served)
    except LeaseLostError:
        raise
    except Exception as fault:
        left = f"; the watchdog opens the gateway: {fault}"
    yield from records
    if left:
        return left
    try:
        yield End()
    except LeaseLostError:
        raise
    except Exception as fault:
        return f"; the watchdog ends the lease: {fault}"
    return ""


def offline(previous: Served, target: Served) -> Protocol:
    """Choose what the next start serves, while nothing runs."""
    yield Preflight(target, probes=False)
    yield from _begin(previous, target, alive=False)
    yield StampCold(target)
    yield Swapped(target)
    yield End()
    return SwapOutcome(True, target, "the stack is down: served from its next start")
