"""Conversations as HTML. Every text of a person or a model is escaped."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from repeng.chat.conversation import Answer, Column, Cost, shown_coefficients

STEPS = (0.1, 0.5, 2.0)  # nats, at which the colour of a token becomes stronger
END = "■"  # shown for the token that ends an answer

# The text on a colour is dark in light and dark themes. Underlines tell both directions apart without colour.
STYLE = """
.talk { display: flex; flex-direction: column; gap: 10px; min-height: 8rem; overflow-wrap: anywhere; }
.talk p { margin: 0; }
.talk .you { align-self: flex-end; max-width: 85%; padding: 8px 12px; border-radius: 12px;
  background: var(--neutral-200); color: #18181b; white-space: pre-wrap; }
.talk .answer { padding: 10px 12px; border: 1px solid var(--border-color-primary); border-radius: 12px; }
.talk .text { white-space: pre-wrap; line-height: 1.9; }
.talk .at { font-weight: 600; font-size: 0.85rem; }
.talk .cost { font-size: 0.85rem; margin-top: 6px; }
.talk .empty { opacity: 0.75; }
.talk summary { cursor: pointer; font-size: 0.85rem; }
.talk .numbers { max-height: 16rem; overflow: auto; }
.talk table { font-size: 0.8rem; border-collapse: collapse; }
.talk td, .talk th { padding: 1px 10px 1px 0; text-align: left; white-space: pre; }
.code { position: relative; margin: 0 0 12px; }
.code pre { max-height: 22rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; padding: 10px;
  font-family: ui-monospace, monospace; font-size: 0.8rem; border: 1px solid var(--border-color-primary); }
.code .copy { float: right; padding: 2px 10px; border: 1px solid currentcolor; border-radius: 6px; font-size: 0.8rem; }
.legend { line-height: 2; font-size: 0.85rem; }
.up1, .up2, .up3, .down1, .down2, .down3 { color: #111; border-radius: 3px; padding: 1px 0; }
.up1 { background: #e3edfb; border-bottom: 2px solid #7aa7e0; }
.up2 { background: #bcd6f7; border-bottom: 2px solid #3b7dd1; }
.up3 { background: #8fbaf0; border-bottom: 2px solid #0f4c9c; }
.down1 { background: #fdebd7; border-bottom: 2px dotted #d9924a; }
.down2 { background: #fbd2a3; border-bottom: 2px dotted #b5651d; }
.down3 { background: #f5af62; border-bottom: 2px dotted #7a3d06; }
"""


@dataclass(frozen=True)
class Turn:
    """One turn of a column. The cost is None while the answer runs."""

    column: Column
    answer: Answer
    cost: Cost | None = None


class Piece(NamedTuple):
    """Visible text of one or more tokens, with the sum of their changes and of their KL."""

    text: str
    change: float
    kl: float


def talk(turns: Sequence[Turn], name: str, *, busy: bool = False) -> str:
    """The conversation of a column."""
    inside = "".join(_turn(turn) for turn in turns) or '<p class="empty">No answer yet.</p>'
    label = html.escape(f"Conversation {name}", quote=True)
    return f'<div class="talk" role="log" aria-label="{label}" aria-busy="{str(busy).lower()}">{inside}</div>'


def legend() -> str:
    """The meaning of the colours."""
    small, middle, large = STEPS
    return (
        '<p class="legend">Change of a token\'s log-probability against c\u00a0=\u00a00, in nats. '
        f'More likely, solid line: <span class="up1">from {small:g}</span> <span class="up2">from {middle:g}</span> '
        f'<span class="up3">from {large:g}</span>. '
        f'Less likely, dotted line: <span class="down1">from −{small:g}</span> '
        f'<span class="down2">from −{middle:g}</span> <span class="down3">from −{large:g}</span>. '
        f"Point at a token for its number. {END} is the end of an answer.</p>"
    )


def note(text: str) -> str:
    """A message, read out by screen readers."""
    return f'<p role="status">{html.escape(text)}</p>'


def code_boxes(python: str, curl: str) -> str:
    """The code of the last answers, each with a button that copies it."""
    return "".join(
        f'<div class="code"><button class="copy" aria-label="Copy the {kind} code">Copy</button><h3>{kind}</h3>'
        f'<pre tabindex="0" role="region" aria-label="The last answers in {kind}">{html.escape(text)}</pre></div>'
        for kind, text in (("Python", python), ("curl", curl))
    )


def _turn(turn: Turn) -> str:
    column, answer, cost = turn.column, turn.answer, turn.cost
    if cost is None:
        text, below = html.escape(answer.text.lstrip() or "…"), ""
    else:
        pieces = list(merged(answer, cost))
        text = "".join(map(_coloured, pieces))
        rows = "".join(
            f"<tr><td>{html.escape(one.text)}</td><td>{one.change:+.2f}</td><td>{one.kl:.2f}</td></tr>"
            for one in pieces
        )
        below = (
            f'<p class="cost">KL {cost.mean:.3f}, RMSE {cost.rmse:.3f} nats per token. '
            f"Log-probability {cost.total:+.2f} nats against c\u00a0=\u00a00.</p>"
            '<details><summary>Numbers per token</summary><div class="numbers" tabindex="0" role="region" '
            'aria-label="Numbers per token"><table><thead><tr><th>text</th>'
            f"<th>change, nats</th><th>KL, nats</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
        )
    return (
        f'<p class="you">{html.escape(column.prompt)}</p><div class="answer">'
        f'<p class="at">{html.escape(shown_coefficients(column.coefficients))}</p>'
        f'<p class="text">{text}</p>{below}</div>'
    )


def _coloured(piece: Piece) -> str:
    """A piece with its colour and its number. Spaces before and after it have no colour."""
    inside = piece.text.strip()
    before, _, after = piece.text.partition(inside) if inside else (piece.text, "", "")
    told = f"{piece.change:+.2f} nats, KL {piece.kl:.2f}"
    return f'{before}<span class="{shade(piece.change)}" title="{told}">{html.escape(inside)}</span>{after}'


def merged(answer: Answer, cost: Cost) -> Iterator[Piece]:
    """The visible pieces of an answer. A token without text joins the next one; the token that ends it is `END`."""
    change = kl = 0.0
    begun = False
    last = len(answer.ids) - 1
    for index, (text, more, spent) in enumerate(zip(answer.pieces, cost.change, cost.kl, strict=True)):
        change, kl = change + more, kl + spent
        if index == last:
            text = f"{text}{END}" if answer.ended == "stop" else text or "…"
        if text:
            yield Piece(text if begun else text.lstrip() or text, change, kl)
            change, kl, begun = 0.0, 0.0, True


def shade(change: float) -> str:
    """The class of a token: direction and strength of its change."""
    strength = sum(abs(change) >= step for step in STEPS)
    return f"{'up' if change > 0 else 'down'}{strength}" if strength else "same"
