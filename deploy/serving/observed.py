"""What is really served: the choice on disk, the engine's weights, the gateway's stamp."""

from dataclasses import dataclass

from agent.config import Home
from deploy.serving.control import ADMIN, ControlError, EngineControl, GatewayControl
from deploy.serving.served import read_served, socket_of


@dataclass(frozen=True, slots=True)
class Observed:
    """Three answers; None where a part does not answer, or (the gateway) is held just now."""

    chosen: str
    engine: str | None
    gateway: str | None

    def others(self, digest: str) -> list[str]:
        """What differs from a digest, in words."""
        told = {"chosen": self.chosen, "engine": self.engine, "gateway": self.gateway}
        return [f"{part} {each[:12]}" for part, each in told.items() if each and each != digest]


def observe(home: Home) -> Observed:
    """Look now. UserError in a home that never served."""
    chosen = read_served(home)
    return Observed(chosen.digest, _engine(home), _gateway(home))


def _engine(home: Home) -> str | None:
    """The digest the engine answers with; a word where its weights have none.

    One that was never reloaded has what its process was started on.
    """
    chosen = read_served(home)
    try:
        with EngineControl.at(socket_of(home, chosen.slot)) as engine:
            served = engine.served()
            if served != "start":
                return served
            directory = engine.started_on()
    except ControlError:
        return None
    return chosen.digest if directory == chosen.directory else directory.rpartition("/")[2]


def _gateway(home: Home) -> str | None:
    try:
        with GatewayControl.at(home.sockets / ADMIN) as gateway:
            state = gateway.state()
    except ControlError:
        return None
    return None if state["held"] else str(state["version"])
