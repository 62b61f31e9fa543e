"""Answers at several coefficients in one batch, and their costs, against single runs and arithmetic by hand."""

import copy
import math
import threading
from contextlib import closing, contextmanager

import pytest
import torch
from peft import get_peft_model

from repeng import SvdSteeringConfig, extract, steer, tiny
from repeng.chat import Answer, Chat, Column
from repeng.control.dials import Dials
from repeng.model.generate import continuations
from repeng.model.tokens import encode

HISTORY = ("the speaker is honest .", "the rain settles on the roof .")


@pytest.fixture(scope="module")
def vector(embedded, tokenizer):
    return extract(embedded[0], tokenizer, tiny.pairs("mood", 40, 0), layers=[2], held_out=0)


@pytest.fixture(scope="module")
def dials(embedded, vector):
    """An adapter and a vector on one model. Tests leave it as it was."""
    torch.manual_seed(1)
    config = SvdSteeringConfig(
        r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[1, 2], rotate_output=True, init_weights=False
    )
    model = get_peft_model(copy.deepcopy(embedded[0]), config).get_base_model()
    return Dials(model.eval(), {"turn": "default"}, {"mood": vector})


@pytest.fixture
def chat(dials, tokenizer):
    return Chat(dials, tokenizer, max_new_tokens=12)


COLUMNS = [
    Column("today the weather seems", {"mood": -1.0}),
    Column("two plus three is", {"mood": 1.0, "turn": -0.5}, HISTORY),
    Column("the speaker is", {}),
    Column("today the weather seems", {"mood": 1.0}),
]


def whole(chat, columns, attempt=0):
    *_, answers = chat.answer(columns, attempt)
    return answers


def test_a_batch_answers_as_single_runs_do(chat):
    together = whole(chat, COLUMNS)
    assert together == [whole(chat, [column])[0] for column in COLUMNS]
    assert len({answer.text for answer in together}) == 4
    assert whole(chat, COLUMNS[::-1]) == together[::-1]


def test_an_answer_is_the_continuation_under_these_coefficients(chat, dials, tokenizer, vector):
    for column, answer in zip(COLUMNS, whole(chat, COLUMNS), strict=True):
        row = encode(tokenizer, column.prompt, history=column.history).ids
        with steer(dials.model, column.coefficients.get("turn", 0.0)):
            with steer(dials.model, column.coefficients.get("mood", 0.0), vector):
                ((ids, _),) = continuations(dials.model, tokenizer, [row], 12)
        assert list(answer.ids) == ids and answer.ended == "length"
        assert answer.text.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_the_text_grows_by_one_token_at_a_time(chat):
    seen = list(chat.answer(COLUMNS[:2]))
    assert len(seen) == 12
    for n, answers in enumerate(seen, start=1):
        for answer, last in zip(answers, seen[-1], strict=True):
            assert answer.ids == last.ids[:n] and len(answer.pieces) == n and last.text.startswith(answer.text)
            assert answer.ended == ("length" if n == 12 else None)


def test_costs_are_those_of_two_passes_without_a_batch(chat, dials, tokenizer, vector):
    answers = whole(chat, COLUMNS)
    for column, answer, cost in zip(COLUMNS, answers, chat.costs(COLUMNS, answers), strict=True):
        before = encode(tokenizer, column.prompt, history=column.history).ids
        ids = torch.tensor([[*before, *answer.ids]])
        logp = []
        for c in (column.coefficients, {}):
            with torch.no_grad(), steer(dials.model, c.get("turn", 0.0)):
                with steer(dials.model, c.get("mood", 0.0), vector):
                    logp.append(dials.model(ids).logits[0, len(before) - 1 : -1].double().log_softmax(-1))
        own, base = logp
        change = [(own - base)[n, token].item() for n, token in enumerate(answer.ids)]
        kl = (own.exp() * (own - base)).sum(-1).tolist()
        assert cost.change == pytest.approx(change, abs=1e-4) and cost.kl == pytest.approx(kl, abs=1e-4)
        assert cost.total == pytest.approx(sum(change), abs=1e-3)
        assert cost.mean == pytest.approx(sum(kl) / 12, abs=1e-4)
        assert cost.rmse == pytest.approx(math.sqrt(sum(one**2 for one in kl) / 12), abs=1e-4)
    assert cost.rmse > cost.mean > 0.01


def test_at_zero_nothing_is_changed_also_beside_other_coefficients(chat):
    columns = [COLUMNS[0], COLUMNS[2], COLUMNS[2]._replace(coefficients={"mood": 0.0, "turn": 0.0}), COLUMNS[1]]
    steered, *zero, other = chat.costs(columns, whole(chat, columns))
    for cost in zero:
        assert set(cost.change) == {0.0} and set(cost.kl) == {0.0} and cost.rmse == cost.mean == cost.total == 0
    assert steered.mean > 0 and other.mean > 0


def test_an_answer_ends_at_the_token_that_ends_a_text(dials, tokenizer, monkeypatch):
    free = whole(Chat(dials, tokenizer, max_new_tokens=12), COLUMNS[:2])
    end = free[0].ids[3]
    monkeypatch.setattr(dials.model.generation_config, "eos_token_id", end)
    chat = Chat(dials, tokenizer, max_new_tokens=12)
    answers = whole(chat, COLUMNS[:2])
    for answer, long in zip(answers, free, strict=True):
        n = long.ids.index(end) + 1 if end in long.ids else 12
        assert answer.ids == long.ids[:n] and answer.ended == ("stop" if end in long.ids else "length")
        assert answer.text == "".join(long.pieces[: n - (answer.ended == "stop")])
    assert answers[0].ended == "stop" and len(answers[0].ids) < 12
    costs = chat.costs(COLUMNS[:2], answers)
    assert [len(cost.kl) for cost in costs] == [len(answer.ids) for answer in answers]


def test_settings_of_the_model_itself_do_not_act(chat, dials, monkeypatch):
    before, config = whole(chat, COLUMNS), dials.model.generation_config
    monkeypatch.setattr(config, "repetition_penalty", 5.0)
    assert whole(chat, COLUMNS) == before
    assert dials.model.generation_config is config


def test_a_try_has_its_own_seed_and_no_other_column_changes_it(dials, tokenizer):
    chat = Chat(dials, tokenizer, max_new_tokens=12, temperature=1.5, seed=7)
    tries = [whole(chat, COLUMNS[:1], attempt)[0] for attempt in range(4)]
    assert len({answer.ids for answer in tries}) > 2
    assert [whole(chat, COLUMNS, attempt)[0] for attempt in range(4)] == tries
    later = Chat(dials, tokenizer, max_new_tokens=12, temperature=1.5, seed=8)
    assert [whole(later, COLUMNS[:1], attempt)[0] for attempt in range(3)] == tries[1:]
    state = torch.get_rng_state()
    whole(chat, COLUMNS)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_closed_answer_stops_and_leaves_the_model_as_it_was(dials, tokenizer):
    ids = tokenizer("the speaker is", return_tensors="pt")["input_ids"]
    before = dials.model(ids).logits
    chat, runs, others = Chat(dials, tokenizer, max_new_tokens=200), [], {*threading.enumerate()}
    hook = dials.model.register_forward_hook(lambda *_: runs.append(1))
    with closing(chat.answer(COLUMNS)) as stream:
        for _ in range(3):
            next(stream)
    hook.remove()
    assert len(runs) < 100
    assert torch.equal(dials.model(ids).logits, before)
    assert {*threading.enumerate()} <= others
    assert len(whole(chat, COLUMNS[:1])[0].ids) == 200


def test_an_answer_that_waits_can_be_closed(chat):
    with chat._lock:
        stream = chat.answer(COLUMNS)
        asked = threading.Thread(target=lambda: list(stream), daemon=True)
        asked.start()
        assert asked.is_alive()
    asked.join(60)
    assert not asked.is_alive()
    results, cancelled = [], threading.Event()
    cancelled.set()
    waiting = threading.Thread(target=chat._generate, args=([[1]], {}, 0, results.append, cancelled), daemon=True)
    with chat._lock:
        waiting.start()
        waiting.join(60)
        assert results == [None]


def test_threads_take_turns(chat, dials, monkeypatch):
    """No two of them steer the model at once, and each gets its own texts."""
    inside, most, at = [], [], dials.at

    @contextmanager
    def watched(coefficients):
        inside.append(1)
        most.append(len(inside))
        with at(coefficients):
            yield
        inside.pop()

    monkeypatch.setattr(dials, "at", watched)
    alone = [whole(chat, [column]) for column in COLUMNS]
    costs = [chat.costs([column], answer) for column, answer in zip(COLUMNS, alone, strict=True)]
    found = {}

    def ask(index):
        answers = whole(chat, [COLUMNS[index]])
        found[index] = answers, chat.costs([COLUMNS[index]], answers)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[index] for index in range(4)] == list(zip(alone, costs, strict=True))
    assert set(most) == {1}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (Column("a", {"moood": 1.0}), "did you mean 'mood'"),
        (Column("a", {"mood": 10.5}), "from -10 to 10; got 10.5"),
        (Column("a", {"mood": -math.inf}), "from -10 to 10; got -inf"),
        (Column("a", {"turn": math.nan}), "from -10 to 10; got nan"),
        (Column(" \n", {}), "the prompt is empty"),
        (Column("\ud800", {}), "the prompt"),
        (Column("rain " * 505, {}), "reads at most 512"),
    ],
    ids=["name", "large", "infinite", "nan", "empty", "surrogate", "long"],
)
def test_what_cannot_be_answered_is_refused(chat, column, message):
    with pytest.raises(ValueError, match=message):
        chat.answer([column])


def test_no_columns_and_no_tokens_are_refused(chat):
    with pytest.raises(ValueError, match="one column or more"):
        chat.answer([])
    with pytest.raises(ValueError, match="without tokens"):
        chat.costs(COLUMNS[:1], [Answer()])


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "seed"])
def test_options_outside_of_their_limits_are_refused(dials, tokenizer, name):
    with pytest.raises(ValueError, match=name):
        Chat(dials, tokenizer, **{name: -1})
    with pytest.raises(ValueError, match="temperature"):
        Chat(dials, tokenizer, temperature=math.nan)


def test_logits_that_are_no_numbers_end_an_answer_in_a_sentence(chat, dials, monkeypatch):
    answers, head = whole(chat, COLUMNS[:1]), dials.model.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda states: torch.full((*states.shape[:-1], 500), math.nan))
    with pytest.raises(ValueError, match="NaN or infinite"):
        whole(chat, COLUMNS[:1])
    with pytest.raises(ValueError, match="NaN or infinite"):
        chat.costs(COLUMNS[:1], answers)
    assert chat._lock.acquire(timeout=10)
