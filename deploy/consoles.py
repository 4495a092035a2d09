"""MLflow's and Prefect's servers: for who signs in, from this machine's own pages only.

    python -m deploy.consoles (mlflow | prefect) HOME PORT

Every process and every web page of a machine reaches its loopback ports. So both servers ask for
a user and a password (HOME/password, mode 0600; MLflow's further users are made in MLflow), and
answer only requests whose Host is this machine and whose Origin, if any, is the server itself.
"""

import argparse
import base64
import hmac
import os
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agent.home import Home, read_sealed, secret, write_sealed
from agent.review import review_word

USER = "anchorage"
SIGN_IN = {  # server -> variables that its clients sign in by
    "mlflow": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    "prefect": ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"),
}
CONSOLES = tuple(SIGN_IN)
LOOPBACK = "127.0.0.1"
HOSTS = frozenset({LOOPBACK, "localhost", "::1"})

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


def credentials(home: Home, consoles: Collection[str] = CONSOLES) -> dict[str, str]:
    """Variables by which MLflow's and Prefect's clients sign in; never part of a command line.

    Args:
        home: Whose servers they are.
        consoles: The servers of this home. Another one keeps what the environment has for it, but
            for this home's password (an old ``export``), which is blanked; as what the environment
            has for another server is for a server of this home. So no server gets another's secret.
    """
    password = secret(home.password)
    ours = {
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": password,
        "PREFECT_API_AUTH_STRING": f"{USER}:{password}",
    }
    signed = {}
    for server, names in SIGN_IN.items():
        for name in names:
            if server in consoles and (name in ours or name in os.environ):
                signed[name] = ours.get(name, "")
            elif server not in consoles and password in os.environ.get(name, ""):
                signed[name] = ""
    return signed


class HostGuard:
    """Refuses requests for another host name, or sent by another site's page; ASGI.

    A page of another origin could use the password the browser remembers, and a name that an
    attacker's resolver points at 127.0.0.1 would make its page the same origin. The port is not
    compared: a forwarded port is another one.
    """

    def __init__(self, app: Asgi, hosts: Collection[str] = HOSTS) -> None:
        self._app, self._hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403 (a websocket is closed before it opens)."""
        if scope["type"] == "lifespan" or self._admits(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": b"this Host or Origin is refused"})

    def _admits(self, headers: Collection[tuple[bytes, bytes]]) -> bool:
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        signed = [value.lower() for name, value in headers if name == b"authorization"]
        if len(hosts) != 1 or _name(f"//{hosts[0]}") not in self._hosts:
            return False
        if not all(each.startswith(b"basic ") for each in signed):
            return False  # MLflow's cache of passwords raises on any other scheme
        return all(origin in (f"http://{hosts[0]}", f"https://{hosts[0]}") for origin in origins)


def _name(url: str) -> str | None:
    """The host's name in a URL; None for one that cannot be read."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


class SignIn:
    """Has the browser ask for user and password, and send them with every request; ASGI.

    Prefect's server checks its API alone, and its pages show a form that knows no user. Asked by
    HTTP's own challenge, a browser sends what was typed in with the requests of the pages' scripts.
    """

    def __init__(self, app: Asgi, user: str, password: str) -> None:
        token = base64.b64encode(f"{user}:{password}".encode())
        self._app, self._wanted = app, b"Basic " + token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is signed, and what Prefect checks itself; challenge all else."""
        signed = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        if scope["type"] != "http" or any(
            hmac.compare_digest(each, self._wanted) for each in signed
        ):
            await self._app(scope, receive, send)
            return

        async def challenge(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] == 401:
                asked = (b"www-authenticate", b'Basic realm="Prefect", charset="UTF-8"')
                message = {**message, "headers": [*message.get("headers", ()), asked]}
            await send(message)

        if scope["path"].startswith("/api/"):
            await self._app(scope, receive, challenge)
        else:
            await challenge({"type": "http.response.start", "status": 401})
            await send({"type": "http.response.body", "body": b"sign in"})


def serve(name: str, home: Home, port: int) -> None:
    """Run one of the two servers until a signal ends it."""
    import uvicorn

    make = {"mlflow": mlflow_app, "prefect": prefect_app}[name]
    uvicorn.run(
        HostGuard(make(home, port)),
        host=LOOPBACK,
        port=port,
        log_level="warning",
        access_log=False,  # a line a request, and a page asks every few seconds
        timeout_keep_alive=30,  # longer than clients keep idle connections
    )


def prefect_app(home: Home, port: int) -> Asgi:
    """Prefect's server; its own settings name the password and allow its own pages only."""
    password = secret(home.password)
    os.environ |= {
        "PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{password}",
        "PREFECT_UI_API_URL": "/api",  # under whatever host and port the page was opened
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{LOOPBACK}:{port}",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS": "10",  # planned ahead; else 100 rows a round
        "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",  # a file in the user's own folder
        "PREFECT__SERVER_FINAL": "1",
    }
    from prefect.server.api.server import create_app

    return SignIn(create_app(final=True), USER, password)


_AUTH = """\
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///{database}
admin_username = {user}
auth_cache_ttl_seconds = 60
"""


def mlflow_app(home: Home, port: int) -> Asgi:
    """MLflow's server on the home's SQLite, with its own users, of whom one is made here.

    It is put together as `mlflow server` does it, whose command could not be given the guard. What
    MLflow asks of its environment has to be there before its modules are imported.
    """
    password = secret(home.password)
    home.mlflow.mkdir(mode=0o700, parents=True, exist_ok=True)
    config = home.mlflow / "auth.ini"
    users = str(home.mlflow_users).replace("%", "%%")  # configparser's own escape
    config.write_text(_AUTH.format(database=users, user=USER), encoding="utf-8")
    store = f"sqlite:///{home.mlflow_db}"
    os.environ |= {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secret(home.mlflow / "pages"),
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(f"{name}:*" for name in sorted(HOSTS)),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes nobody asks for anything
        "_MLFLOW_SERVER_FILE_STORE": store,
        "_MLFLOW_SERVER_REGISTRY_STORE": store,
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(home.mlflow_artifacts),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SGI_NAME": "uvicorn",
        "_MLFLOW_IN_JOB_EXECUTOR": "false",
    }
    from mlflow.server import app as pages
    from mlflow.server import auth
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(store, store, "mlflow-artifacts:/")
    pages.after_request(lambda reply: _note(home, reply))
    app: Asgi = auth.create_app(pages)
    if not auth.store.authenticate_user(USER, password):  # the home has another password now
        auth.store.update_user(USER, password=password)
    return app


_NOTING = threading.Lock()  # Flask answers from several threads


def _note(home: Home, reply: Any) -> Any:
    """Keep who reviewed: MLflow's tags and aliases do not say who set them."""
    from flask import request

    act = reviewed(request.path, request.get_json(silent=True) if request.is_json else None)
    if act is not None and reply.status_code == 200 and request.authorization is not None:
        sign(home, act, str(request.authorization.username))
    return reply


def sign(home: Home, act: str, user: str) -> None:
    """Keep that a user who signed in did an act, named as ``reviews`` says."""
    with _NOTING:
        noted = reviews(home) | {act: {"user": user, "time": time.time()}}
        write_sealed(home.reviews_json, noted)


def reviewed(path: str, body: Any) -> str | None:
    """The review that a request to MLflow is, as ``reviews`` names it; None for any other."""
    if not isinstance(body, Mapping):
        return None
    version = body.get("version")
    if path.endswith("/mlflow/model-versions/set-tag"):
        word = review_word(str(body.get("key")), body.get("value"))
        return None if word is None else f"{version} {word}"
    if path.endswith("/mlflow/registered-models/alias") and body.get("alias") == "champion":
        return f"{version} champion"
    return None


def reviews(home: Home) -> dict[str, dict[str, Any]]:
    """Who signed: "<version number> approve | reject | champion" -> {"user", "time"}."""
    try:
        return read_sealed(home.reviews_json)
    except FileNotFoundError:
        return {}


def signer(
    home: Home, version: str, word: str, wait_s: float = 1.0, since: float = 0.0
) -> str | None:
    """The user who signed an act on a version; None for one that was not made in MLflow's pages.

    A name is kept a moment after MLflow has answered, so one that is missing is waited for. What
    was signed before ``since`` (unix seconds) was answered then: it does not count again.
    """
    until = time.monotonic() + wait_s
    while True:
        noted = reviews(home).get(f"{version} {word}")
        if noted is not None and noted["time"] > since:
            return str(noted["user"])
        if time.monotonic() >= until:
            return None
        time.sleep(0.05)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="deploy.consoles")
    parser.add_argument("name", choices=("mlflow", "prefect"))
    parser.add_argument("home", type=Path)
    parser.add_argument("port", type=int)
    chosen = parser.parse_args()
    os.umask(0o077)
    serve(chosen.name, Home.at(chosen.home), chosen.port)
