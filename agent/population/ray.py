"""Engines on a Ray cluster: one actor an engine, one placement group an actor, on one node.

The actor keeps the engine in a process of its own, as on one machine, so a broken engine never
takes the actor's node with it. Model directories and snapshots are paths every node can read.
"""

from dataclasses import dataclass
from typing import Any

from agent.errors import UserError
from agent.population.placement import EngineOptions
from agent.population.process import LIMIT_S, EngineLauncher, EngineLostError
from agent.population.remote import Json, RemoteEngine
from agent.population.schedule import EngineStartError

HOLD_S = 30.0  # for this node to have free what the serving engine uses
CLOSE_S = 10.0  # for an actor to end its engine by itself; without it the engine ends soon after


@dataclass(frozen=True, slots=True)
class Placement:
    """What one engine takes of one node."""

    cpus: float = 1.0
    gpus: float = 0.0  # tensor_parallel on GPU nodes; a fraction shares one
    wait_s: float = 300.0  # for the cluster to have it free


def attach(address: str | None, held: Placement | None = None) -> list[float]:
    """Join the cluster at this address (None: a local one of this machine), once.

    Args:
        held: What the serving engine takes of this machine, which no actor may get.

    Returns:
        The CPUs of each node that engines may have.
    """
    import ray
    from ray.util import get_node_ip_address

    joins = not ray.is_initialized()  # one process joins once, whatever it runs later
    if joins:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except ConnectionError as error:
            raise UserError(f"ray: no cluster at {address!r} ({error})".split("\n")[0]) from error
    here = get_node_ip_address()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    is_node = any(node["NodeManagerAddress"] == here for node in nodes)
    if joins and held and is_node:  # a driver outside the cluster holds nothing of it
        _hold(held, here)
    taken = held.cpus if held else 0.0
    return [
        max(0.0, node["Resources"].get("CPU", 0.0) - taken * (node["NodeManagerAddress"] == here))
        for node in nodes
    ]


def detach() -> None:
    """Leave the cluster; a local one ends."""
    import ray

    ray.shutdown()


def _hold(held: Placement, node: str) -> None:
    """Take what the serving engine uses on this node out of Ray's account, until ``detach``.

    Ray counts what its own actors use and nothing else: without this an engine would be placed on
    the GPU that serves. Ray hands out a node's GPUs from the first one, which is serving's.
    """
    from ray.util.placement_group import placement_group

    bundle = _bundle(held) | {f"node:{node}": 0.001}
    if not placement_group([bundle]).wait(HOLD_S):
        raise UserError(f"ray: this node ({node}) has not {_bundle(held)} free, which serving uses")


def _bundle(place: Placement) -> dict[str, float]:
    """A placement as Ray's resources."""
    return {"CPU": place.cpus} | ({"GPU": place.gpus} if place.gpus else {})


class EngineActor:
    """The actor: one engine process, its calls passed through as JSON values."""

    def __init__(self, options: Json, limit_s: float):
        self._launcher = EngineLauncher()
        self._engine = self._launcher.engine(EngineOptions.from_json(options), limit_s)

    def call(self, method: str, arguments: Json) -> Json:
        """One reply; errors travel as values, because their classes may not."""
        try:
            return {"result": self._engine.call(method, arguments)}
        except UserError as error:
            starts = isinstance(error, EngineStartError)
            return {"error": str(error), "user": True, "start": starts}
        except EngineLostError as error:
            return {"error": str(error), "user": False}

    def close(self) -> None:
        """End the engine and its launcher."""
        self._engine.close()
        self._launcher.close()


class RayEngine(RemoteEngine):
    """The ``Engine`` protocol over one actor; call ``attach`` first.

    Its place is asked for at once and waited for by the first call, so that the engines of a
    population wait for theirs together.
    """

    def __init__(self, options: EngineOptions, place: Placement, limit_s: float = LIMIT_S):
        from ray.util.placement_group import placement_group

        super().__init__(self._ask)
        self._options, self._place, self._limit_s = options, place, limit_s
        # Ranks of one engine: one node.
        self._group = placement_group([_bundle(place)], strategy="STRICT_PACK")
        self._actor: Any = None

    def ready(self) -> None:
        """Wait for the place and start the actor in it, which starts its engine meanwhile.

        Raises:
            EngineStartError: No node had the place in time.
        """
        if self._actor is not None:
            return
        if not self._group.wait(self._place.wait_s):
            bundle, wait_s = _bundle(self._place), self._place.wait_s
            raise EngineStartError(f"ray: no node had {bundle} free within {wait_s:g} s")
        self._actor = _started(self._group, self._place, self._options, self._limit_s)

    def close(self) -> None:
        """End the engine, then its actor, which may be busy or gone; free its place."""
        import ray
        from ray.util import remove_placement_group

        if ray.is_initialized():
            if self._actor is not None:
                ray.wait([self._actor.close.remote()], timeout=CLOSE_S)
                ray.kill(self._actor)
            remove_placement_group(self._group)

    def _ask(self, method: str, arguments: Json) -> Any:
        """One call and its result."""
        self.ready()
        reply = self._get(self._actor.call.remote(method, arguments))
        if "error" not in reply:
            return reply["result"]
        if reply.get("start"):
            raise EngineStartError(reply["error"])
        raise UserError(reply["error"]) if reply["user"] else EngineLostError(reply["error"])

    def _get(self, reference: Any) -> Any:
        """Wait for the actor; EngineLostError when it is gone or late."""
        import ray

        try:
            return ray.get(reference, timeout=self._limit_s)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().split("\n")[0]
            raise EngineLostError(f"engine on ray: {type(error).__name__}: {reason}") from error


def _started(group: Any, place: Placement, options: EngineOptions, limit_s: float) -> Any:
    """An actor in that group; it starts its engine while the caller goes on."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    actor = ray.remote(num_cpus=place.cpus, num_gpus=place.gpus)(EngineActor)
    strategy = PlacementGroupSchedulingStrategy(placement_group=group)
    return actor.options(scheduling_strategy=strategy).remote(options.to_json(), limit_s)
