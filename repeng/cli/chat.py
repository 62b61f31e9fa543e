"""`repeng chat`: a conversation at any coefficient, in the terminal or on a local page."""

import os
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib.util import find_spec

from repeng._extras import install_command
from repeng.cli.parsing import Commands, add_base, add_paths, check_base, parsed
from repeng.cli.serve import KEY_VARIABLE, check_host, check_port
from repeng.serve.names import named_paths

HOST, PORT = "127.0.0.1", 7860


def add(commands: Commands) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "chat",
        help="talk to a model at any coefficient, in the terminal or on a local page",
        description="Talk to a model and turn its coefficients between the turns. Each answer shows what it costs: "
        "the KL divergence from the model at c = 0. With --web, a page shows two conversations side by side and "
        "colours each token by the change of its log-probability.",
        allow_abbrev=False,
    )
    add_paths(command)
    add_base(command, "by default the one that an adapter or a vector names")
    command.add_argument("--max_new_tokens", type=int, default=96, help="tokens of an answer. Default: 96")
    command.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely tokens. Default: 0")
    command.add_argument("--seed", type=int, default=0, help="seed of answers at a temperature above 0. Default: 0")
    command.add_argument("--web", action="store_true", help="open a local page instead; needs the extra `web`")
    command.add_argument(
        "--host", help=f"address of the page; any but a loopback address needs {KEY_VARIABLE}. Default: {HOST}"
    )
    command.add_argument("--port", type=int, help=f"port of the page; 0 takes a free port. Default: {PORT}")
    command.add_argument("--use_cpu", action="store_true", help="run on the CPU even if there is a GPU")


def run(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Check the options, then talk."""
    options = parsed(parser, argv)
    for name in ("host", "port"):
        if getattr(options, name) is not None and not options.web:
            raise ValueError(f"--{name} is an option of the page; give --web too")
    host, port = options.host or HOST, PORT if options.port is None else options.port
    check_port(port)
    check_base(options)
    api_key = os.environ.get(KEY_VARIABLE) or None
    check_host(host, api_key)
    if options.web and not find_spec("gradio"):
        raise ImportError(f"the page needs gradio: {install_command('web')}")
    paths = named_paths(options.paths)  # last, because it may download
    from repeng.commands.chat import chat

    chat(
        paths,
        options.model_name_or_path,
        options.gguf_file,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        page=(host, port, api_key) if options.web else None,
        use_cpu=options.use_cpu,
    )
