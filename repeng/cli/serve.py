"""`repeng serve`: an OpenAI-compatible server with a coefficient per request."""

import os
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec

from repeng._extras import install_command
from repeng.cli.parsing import Commands, add_base, add_paths, check_base, parsed
from repeng.serve.limits import Limits
from repeng.serve.names import named_paths

KEY_VARIABLE = "REPENG_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add(commands: Commands) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "serve",
        help="run an OpenAI-compatible server with a coefficient per request",
        description='Serve OpenAI\'s chat completions and completions. A request sets coefficients with "steer": '
        '{"NAME": C}; adapters and vectors that it does not name are at 0. Requests with different coefficients share '
        f"one batch. The API key is read from the environment variable {KEY_VARIABLE}.",
        allow_abbrev=False,
    )
    add_paths(command)
    add_base(command, "by default the one that an adapter or a vector names")
    command.add_argument("--host", default="127.0.0.1", help="address; any but a loopback address needs an API key")
    command.add_argument("--port", type=int, default=8000, help="port; 0 takes a free port. Default: 8000")
    for one in fields(Limits):
        told = "" if one.default is None else f". Default: {one.default:g}"
        kind = float if isinstance(one.default, float) else int
        command.add_argument(f"--{one.name}", type=kind, default=one.default, help=one.metadata["help"] + told)
    command.add_argument("--use_cpu", action="store_true", help="run on the CPU even if there is a GPU")


def run(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Check the options, then serve."""
    options = parsed(parser, argv)
    check_port(options.port)
    limits = Limits(**{one.name: getattr(options, one.name) for one in fields(Limits)})
    check_base(options)
    api_key = os.environ.get(KEY_VARIABLE) or None
    check_host(options.host, api_key)
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if not find_spec(name)]
    if missing:
        raise ImportError(f"serving needs {', '.join(missing)}: {install_command('serve')}")
    paths = named_paths(options.paths)  # last, because it may download
    from repeng.commands.serve import serve

    serve(
        paths,
        options.model_name_or_path,
        options.gguf_file,
        host=options.host,
        port=options.port,
        api_key=api_key,
        use_cpu=options.use_cpu,
        limits=limits,
    )


def check_host(host: str, api_key: str | None) -> None:
    """Raise ValueError if the address admits other machines and there is no API key."""
    if host not in LOOPBACK and api_key is None:
        raise ValueError(
            f"--host {host} admits other machines: set an API key for the requests in the environment variable "
            f"{KEY_VARIABLE}"
        )


def check_port(port: int) -> None:
    """Raise ValueError unless the port is one."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port should be 0 to {2**16 - 1}; got {port}")
