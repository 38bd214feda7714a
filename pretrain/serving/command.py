"""The life of the server: what `sambalm serve` does."""

import importlib.util
import signal
import socket
from pathlib import Path
from types import FrameType

from sambalm.pretrain.generation.source import load_source
from sambalm.pretrain.serving.engine import Engine
from sambalm.pretrain.serving.errors import ServingError

PACKAGES = ("starlette", "uvicorn")
END_S = 10


def serve_model(
    path: Path,
    *,
    host: str,
    port: int,
    name: str | None = None,
    max_batch: int,
    max_tokens: int,
    device: str | None = None,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    step: int | None = None,
) -> None:
    """Serves a model until Ctrl-C or SIGTERM; the arguments from `device` on are those of `load_source`.

    Args:
        port: 0 for any that is free.
        name: of the model, for clients; None for the path.
        max_batch: texts that are generated at once.
        max_tokens: of a text at most.

    Raises:
        ServingError: packages are missing, or the address cannot be used.
        GenerationError, HFError, CheckpointError, DataError: of the model.
        KeyboardInterrupt: after the clean end that Ctrl-C asks for.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ServingError(f"serving needs {' and '.join(missing)}: pip install 'sambalm[serve]'")
    import uvicorn

    from sambalm.pretrain.serving.app import Served, make_app

    listener = _bind(host, port)
    source = load_source(path, device=device, dtype=dtype, tokenizer=tokenizer, step=step)
    engine = Engine(source, max_rows=max_batch)
    served = Served(source, name or str(path), max_tokens)

    class Server(uvicorn.Server):
        """A server whose texts end with it: it would wait for all of them."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            engine.end()
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            shown_host, shown_port, *_ = listener.getsockname()
            shown_host = f"[{shown_host}]" if ":" in shown_host else shown_host
            print(f"serving {served.name} at http://{shown_host}:{shown_port}/v1 (Ctrl-C ends it)", flush=True)

    config = uvicorn.Config(
        make_app(served, engine),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=END_S,
    )
    descriptor = signal.set_wakeup_fd(-1)  # of what would end a process that does not end at Ctrl-C
    try:
        Server(config).run(sockets=[listener])
    finally:
        signal.set_wakeup_fd(descriptor)
        engine.end()
        engine.join(END_S)


def _bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound and does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ServingError(
            f"port {port} of {host} cannot be used ({error.strerror}): give another --port or --host"
        ) from error
    return listener
