"""The program behind `nanogpt serve`: a trained model for other programs, and a page to play with."""

import asyncio
import dataclasses
import errno
import logging
import os
import signal
import socket
import time
from importlib import resources
from pathlib import Path

import uvicorn
from prometheus_client import CollectorRegistry

from nanogpt.api import Service, create_app
from nanogpt.board import add_board
from nanogpt.checkpoint import checkpoints_of, load_trained
from nanogpt.device import choose_device
from nanogpt.engine import Engine, quantize
from nanogpt.errors import ConfigError
from nanogpt.guard import Connection, Guard
from nanogpt.scheduler import Scheduler
from nanogpt.settings import ServeConfig, SourceConfig

log = logging.getLogger(__name__)

_SMALL = 10e6  # parameters


def serve(config: ServeConfig) -> None:
    """Answer requests until a signal says to stop; then finish those under way. A second Ctrl-C cuts them off."""
    config = dataclasses.replace(config, api_key=config.api_key or os.environ.get("NANOGPT_API_KEY", ""))
    if problems := [*config.problems()]:
        raise ConfigError(problems[0])
    listener = _listen(config.host, config.port)
    app, scheduler = load(config)
    server = make_server(app, config)
    listener.listen(2048)  # from here on callers are answered, or wait a moment
    host, port = listener.getsockname()[:2]
    if not config.api_key and host not in ("127.0.0.1", "::1"):
        log.warning("anyone who reaches this machine may use the model: --api_key=KEY asks for a key")
    print(f"page at http://{f'[{host}]' if ':' in host else host}:{port}, API at /v1; Ctrl-C ends", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn hands them on after it has ended because of them
    server.run(sockets=[listener])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # no exception: Python can't end while torch computes in a thread
    if scheduler:
        scheduler.close()


def make_server(app: Guard, config: ServeConfig) -> uvicorn.Server:
    """What speaks HTTP for the guard and those behind it."""
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="warning" if config.verbosity == "debug" else "error",  # warnings are of callers' mistakes
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=config.timeout,
        )
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Not that a second Ctrl-C has cut somebody off."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def load(config: ServeConfig) -> tuple[Guard, Scheduler | None]:
    """The model behind its API, and what runs it; of a run that has no checkpoint yet, the curves alone."""
    runs = [Path(path) for path in config.out_dir]
    service = None
    has_checkpoint = bool(checkpoints_of(runs[0])) or (runs[0] / "best.pt").exists()
    if config.init_from == "resume" and not has_checkpoint and (runs[0] / "metrics.jsonl").exists():
        log.info(f"{runs[0]} has no checkpoint yet: its curves are shown, nothing can be generated")
    else:
        service = _service(config)
    app = create_app(service, resources.files("nanogpt").joinpath("page.html").read_text(encoding="utf-8"))
    add_board(app, runs)
    scheduler = service.scheduler if service else None
    registry = scheduler.registry if scheduler else CollectorRegistry()
    names = [config.host, *config.allow_host]
    return Guard(app, registry, names=names, api_key=config.api_key, max_body=config.max_body), scheduler


def _service(config: ServeConfig) -> Service:
    """The model, ready to answer."""
    device = choose_device(dataclasses.replace(config, compile=False))
    out_dir = config.out_dir[0]
    trained = load_trained(
        SourceConfig(init_from=config.init_from, checkpoint=config.checkpoint, out_dir=out_dir), device
    )
    model, tokenizer = trained.model, trained.tokenizer
    if config.block_size:
        model.crop_block_size(min(config.block_size, model.config.block_size))
    size = model.get_num_params()
    quantize(model, device.dtype, int8=config.int8)
    engine = Engine(model, config.rows, vocab_size=tokenizer.vocab_size, dtype=device.dtype)
    name = config.name or Path(out_dir if config.init_from == "resume" else config.init_from).resolve().name
    bytes_ = sum(part.numel() * part.element_size() for part in (engine.cache.keys, engine.cache.values))
    log.info(
        f"{trained.name}, {size / 1e6:.2f}M parameters, as {name!r}; {config.rows} rows of "
        f"{model.config.block_size:,} tokens side by side ({bytes_ / 1e6:,.0f} MB)"
    )
    # a small model computes no faster with more threads, and the connections need a core, too
    scheduler = Scheduler(engine, tokenizer, config.queue, threads=1 if size < _SMALL else 0)
    return Service(name, scheduler, tokenizer, config.max_new_tokens, config.timeout, int(time.time()))


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address, before a model is loaded for nothing. Raises `ConfigError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
            advice = "choose another --port, 0 for any that is free"
        else:
            advice = "--host takes an address of this machine: 127.0.0.1, only it can call; 0.0.0.0, others can, too"
        raise ConfigError(f"--host={host} --port={port}: {error}; {advice}") from error
    return listener
