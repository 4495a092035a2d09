"""Engines on a Ray cluster: one actor an engine, one placement group an actor, on one node.

The actor keeps the engine in a process of its own, as on one machine, so a broken engine never
takes the actor's node with it. Model directories and snapshots are paths every node can read.
"""

from dataclasses import dataclass
from typing import Any

from agent.errors import UserError
from agent.population.nursery import Nursery
from agent.population.process import LIMIT_S, EngineLostError
from agent.population.remote import Json, RemoteEngine
from agent.population.vllm import EngineOptions

CLOSE_S = 10.0  # for an actor to end its engine by itself; without it the engine ends soon after


@dataclass(frozen=True, slots=True)
class Placement:
    """What one engine takes of one node."""

    cpus: float = 1.0
    gpus: float = 0.0  # tensor_parallel on GPU nodes; a fraction shares one
    wait_s: float = 300.0  # for the cluster to have it free


def attach(address: str | None) -> None:
    """Join the cluster at this address (None: a local one of this machine), once."""
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    except ConnectionError as error:
        raise UserError(f"ray: no cluster at {address!r} ({error})".split("\n")[0]) from error


def detach() -> None:
    """Leave the cluster; a local one ends."""
    import ray

    ray.shutdown()


class Seat:
    """The actor: one engine process, its calls passed through as JSON values."""

    def __init__(self, options: Json, limit_s: float):
        self._nursery = Nursery()
        self._engine = self._nursery.engine(EngineOptions.from_json(options), limit_s)

    def call(self, method: str, arguments: Json) -> Json:
        """One reply; errors travel as values, because their classes may not."""
        try:
            return {"result": self._engine.call(method, arguments)}
        except UserError as error:
            return {"error": str(error), "user": True}
        except EngineLostError as error:
            return {"error": str(error), "user": False}

    def close(self) -> None:
        """End the engine and its nursery."""
        self._engine.close()
        self._nursery.close()


class RayEngine(RemoteEngine):
    """The ``Engine`` protocol over one actor; call ``attach`` first."""

    def __init__(self, options: EngineOptions, place: Placement, limit_s: float = LIMIT_S):
        super().__init__(self._ask)
        self._limit_s = limit_s
        self._group = _reserve(place)
        self._seat = _seated(self._group, place, options, limit_s)

    def close(self) -> None:
        """End the engine, then its actor, which may be busy or gone; free its place."""
        import ray
        from ray.util import remove_placement_group

        if ray.is_initialized():
            ray.wait([self._seat.close.remote()], timeout=CLOSE_S)
            ray.kill(self._seat)
            remove_placement_group(self._group)

    def _ask(self, method: str, arguments: Json) -> Any:
        """One call and its result."""
        reply = self._get(self._seat.call.remote(method, arguments))
        if "error" not in reply:
            return reply["result"]
        raise UserError(reply["error"]) if reply["user"] else EngineLostError(reply["error"])

    def _get(self, reference: Any) -> Any:
        """Wait for the actor; EngineLostError when it is gone or late."""
        import ray

        try:
            return ray.get(reference, timeout=self._limit_s)
        except ray.exceptions.RayError as error:
            told = str(error).strip().split("\n")[0]
            raise EngineLostError(f"engine on ray: {type(error).__name__}: {told}") from error


def _reserve(place: Placement) -> Any:
    """A placement group of one bundle, or one line that the cluster has no such place."""
    from ray.util.placement_group import placement_group, remove_placement_group

    bundle = {"CPU": place.cpus} | ({"GPU": place.gpus} if place.gpus else {})
    group = placement_group([bundle], strategy="STRICT_PACK")
    if not group.wait(place.wait_s):
        remove_placement_group(group)
        raise UserError(f"ray: no node had {bundle} free within {place.wait_s:g} s")
    return group


def _seated(group: Any, place: Placement, options: EngineOptions, limit_s: float) -> Any:
    """An actor in that group; it starts its engine while the caller goes on."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    actor = ray.remote(num_cpus=place.cpus, num_gpus=place.gpus)(Seat)
    strategy = PlacementGroupSchedulingStrategy(placement_group=group)
    return actor.options(scheduling_strategy=strategy).remote(options.to_json(), limit_s)
