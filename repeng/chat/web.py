"""A local page with two conversations side by side; needs the extra `web`."""

import html
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib import import_module
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from repeng.chat import markup
from repeng.chat.conversation import Answer, Chat, Column
from repeng.chat.markup import Turn
from repeng.chat.snippets import Origin, as_curl, as_python

NAMES = ("A", "B")
BEGIN = (-1.0, 1.0)  # coefficients of the first adapter or vector when the page opens
REACH, STEP = 4.0, 0.1  # of the sliders
PAUSE = 0.1  # seconds between two updates of the page
USER = "repeng"  # name at the login
SWITCHES = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "GRADIO_SSR_MODE": "False"}
HEADERS = {
    # The page works without any other host, and this stops what a later version of gradio might fetch.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
STYLE = (
    markup.STYLE
    + """
footer { display: none !important; }
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
"""
)

COPY = """<script>
document.addEventListener("click", event => {
  const button = event.target.closest("button.copy");
  if (button) navigator.clipboard.writeText(button.parentElement.querySelector("pre").textContent)
    .then(() => { button.textContent = "Copied"; });
});
</script>"""


class Shown(NamedTuple):
    """What a page remembers: the turns of each column, and the number of the try of the last answers."""

    turns: tuple[tuple[Turn, ...], ...] = ((), ())
    attempt: int = 0


def _last(turns: Sequence[Turn]) -> tuple[Column, str] | None:
    """The last turn of a column, without its cost."""
    return (turns[-1].column, turns[-1].answer.text) if turns else None


class Session:
    """The conversations of all open pages: what their buttons do.

    Args:
        chat: the model.
        origin: where it comes from.
    """

    def __init__(self, chat: Chat, origin: Origin) -> None:
        self.chat: Chat = chat
        self.origin: Origin = origin
        self._running: dict[str, threading.Event] = {}  # by page

    def columns(self, prompts: Sequence[str], settings: Sequence[float], shown: Shown) -> dict[int, Column]:
        """The columns that have a prompt, by index.

        Args:
            prompts: a prompt per column.
            settings: the sliders, all of the first column first.
            shown: what the page remembers.
        """
        names = self.chat.dials.names
        found = {}
        for index, prompt in enumerate(prompts):
            own = settings[index * len(names) : (index + 1) * len(names)]
            history = tuple(text for turn in shown.turns[index] for text in (turn.column.prompt, turn.answer.text))
            if prompt.strip():
                found[index] = Column(prompt.strip(), dict(zip(names, map(float, own), strict=True)), history)
        return found

    def answer(self, page: str, columns: dict[int, Column], shown: Shown, attempt: int) -> Iterator[Shown]:
        """Answer in some columns and yield what to show, at last with the costs."""
        asked = list(columns.values())
        stop = self._running[page] = threading.Event()
        answers: list[Answer] = [Answer() for _ in asked]

        def grown(turns: Sequence[Turn]) -> Shown:
            new = dict(zip(columns, turns, strict=True))
            return Shown(tuple((*old, new[i]) if i in new else old for i, old in enumerate(shown.turns)), attempt)

        try:
            due = 0.0
            with closing(self.chat.answer(asked, attempt)) as stream:  # type: ignore[type-var]
                for answers in stream:
                    if stop.is_set():
                        break
                    if monotonic() >= due:
                        yield grown([Turn(one, answer) for one, answer in zip(asked, answers, strict=True)])
                        due = monotonic() + PAUSE
            costs = self.chat.costs(asked, answers)
            yield grown([Turn(*three) for three in zip(asked, answers, costs, strict=True)])
        finally:
            self._running.pop(page, None)

    def stop(self, page: str) -> None:
        """End the answer that a page waits for."""
        if page in self._running:
            self._running[page].set()

    def remark(self, shown: Shown, old: Shown) -> str:
        """What a user should know about new answers."""
        if self.chat.temperature == 0 and [_last(one) for one in shown.turns] == [_last(one) for one in old.turns]:
            return "At temperature 0, the same coefficients give the same answer. Start with a --temperature above 0."
        return ""

    def code(self, shown: Shown) -> tuple[str, str]:
        """Python and curl for the last answers; a hint if there are none."""
        last = [turns[-1].column for turns in shown.turns if turns]
        if not last:
            return "# Here stands the code of the last answers.", "# Here stands the code of the last answers."
        given = (self.chat, self.origin, last, shown.attempt)
        return as_python(*given), as_curl(*given)


def make_blocks(session: Session) -> Any:
    """The page, as gradio's `Blocks`."""
    gr = _gradio()
    names = session.chat.dials.names
    with gr.Blocks(title=f"repeng: {session.origin.name}", analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>Steer {html.escape(session.origin.name)}</h1>")
        state = gr.State(Shown())
        sliders, panels = [], []
        with gr.Row():
            for column, begin in zip(NAMES, BEGIN, strict=True):
                with gr.Column(min_width=300, elem_id=f"column-{column}"):
                    for index, name in enumerate(names):
                        value = begin if index == 0 else 0.0
                        label = f"{column}: coefficient of {name}"
                        sliders.append(gr.Slider(-REACH, REACH, value, step=STEP, label=label))
                    panels.append(gr.HTML(markup.talk([], column)))
        gr.HTML(markup.legend())
        same = gr.Checkbox(True, label="Same prompt for A and B")
        with gr.Row():
            prompts = [
                gr.Textbox(label="Prompt", max_lines=8, min_width=300),
                gr.Textbox(label="Prompt for B", max_lines=8, min_width=300, visible=False),
            ]
        with gr.Row():
            send = gr.Button("Send", variant="primary", min_width=120)
            again = gr.Button("Regenerate", min_width=120)
            stop = gr.Button("Stop", min_width=120)
            clear = gr.Button("Clear", min_width=120)
        status = gr.HTML(markup.note(""))
        with gr.Accordion("Copy as Python or curl", open=False):
            code = gr.HTML(markup.code_boxes(*session.code(Shown())))

        panel_names = tuple(zip(NAMES, range(len(NAMES)), strict=True))

        def drawn(shown: Shown, told: str, code_of: Shown | None = None) -> list[Any]:
            """The outputs `panels, state, status, code`. Without `code_of`, answers are running."""
            busy = code_of is None
            talks = [markup.talk(shown.turns[index], name, busy=busy) for name, index in panel_names]
            boxes = gr.skip() if code_of is None else markup.code_boxes(*session.code(code_of))
            return [*talks, gr.skip() if busy else shown, markup.note(told), boxes]

        def answered(
            page: Any,
            columns: dict[int, Column],
            before: Shown,
            old: Shown,
            attempt: int,
            typed: Sequence[str] = (),
        ) -> Iterator[Any]:
            """Outputs while columns are answered behind `before`. If they fail, the page shows `old` again.

            The boxes with the typed prompts are emptied at the beginning, and filled again after a failure.
            """
            try:
                if not columns:
                    raise ValueError("there is no prompt; write one")
                yield [*drawn(old, "Waiting for the model …"), *("" for _ in typed)]
                kept = [gr.skip() for _ in typed]
                shown = before
                for shown in session.answer(page.session_hash, columns, before, attempt):
                    yield [*drawn(shown, "Generating …"), *kept]
                yield [*drawn(shown, session.remark(shown, old), shown), *kept]
            except (ValueError, RuntimeError) as error:
                yield [*drawn(old, f"Error: {error}", old), *typed]

        def on_send(page: Any, shown: Shown, one: bool, first: str, second: str, *settings: float) -> Iterator[Any]:
            columns = session.columns([first, first if one else second], settings, shown)
            yield from answered(page, columns, shown, shown, 0, (first, second))

        def on_again(page: Any, shown: Shown, *settings: float) -> Iterator[Any]:
            before = shown._replace(turns=tuple(turns[:-1] for turns in shown.turns))
            prompts = [turns[-1].column.prompt if turns else "" for turns in shown.turns]
            yield from answered(page, session.columns(prompts, settings, before), before, shown, shown.attempt + 1)

        def on_stop(page: Any) -> None:
            session.stop(page.session_hash)

        for handler in (on_send, on_again, on_stop):
            handler.__annotations__["page"] = gr.Request  # which gradio fills in

        def on_clear() -> list[Any]:
            return drawn(Shown(), "", Shown())

        def on_same(one: bool) -> list[Any]:
            return [gr.update(label="Prompt" if one else "Prompt for A"), gr.update(visible=not one)]

        outputs = [*panels, state, status, code]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        queued = quiet | {"concurrency_limit": 1, "concurrency_id": "model"}  # one queue, because there is one model
        for trigger in (send.click, *(prompt.submit for prompt in prompts)):
            trigger(on_send, [state, same, *prompts, *sliders], [*outputs, *prompts], **queued)
        again.click(on_again, [state, *sliders], outputs, **queued)
        clear.click(on_clear, None, outputs, **queued)
        stop.click(on_stop, None, None, queue=False, **quiet)
        same.change(on_same, same, prompts, queue=False, **quiet)
    return blocks


def make_page(session: Session, hosts: Sequence[str], password: str | None) -> Any:
    """The page as an ASGI application.

    Args:
        session: what the page does.
        hosts: names that a request may use for this machine; "*" for any.
        password: what the user must enter; None for no login.
    """
    gr = _gradio()
    fastapi = import_module("fastapi")
    trusted = import_module("starlette.middleware.trustedhost").TrustedHostMiddleware
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # of the machine itself
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        make_blocks(session),
        path="",
        auth=None if password is None else (USER, password),
        footer_links=[],
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        pwa=False,
        theme=gr.themes.Default(primary_hue="slate", **fonts),
        css=STYLE,
        head=COPY,
    )
    app.add_middleware(_Guard)
    app.add_middleware(trusted, allowed_hosts=list(hosts))
    return app


def serve_page(chat: Chat, origin: Origin, host: str, port: int, password: str | None) -> None:
    """Serve the page until a signal ends it.

    Args:
        chat: the model.
        origin: where it comes from.
        host: address.
        port: port; 0 takes a free one.
        password: what the user must enter; None for no login.
    """
    uvicorn = import_module("uvicorn")
    hosts = ("*",) if password else ("127.0.0.1", "localhost", "[::1]")
    app = make_page(Session(chat, origin), hosts, password)
    if password:
        print(f"login: {USER!r} and the key in the environment", flush=True)
    # Open pages hold a connection, so the server would wait for them.
    uvicorn.run(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=1)


class _Guard:
    """Refuses requests of other sites' pages, and adds `HEADERS` to all answers."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = given.get("origin")
        if origin is not None and urlsplit(origin).netloc != given.get("host"):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"pages of other sites may not use this page"})
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await self._app(scope, receive, with_headers)


def _gradio() -> Any:
    """The package gradio, which has no types of its own for many names."""
    os.environ.update(SWITCHES)  # it reads some of them at import
    return import_module("gradio")
