"""Arguments of the Python API: what is taken, and what each wrong one is told before anything is sent."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from flexgen_lite import Client, FlexGenLite, Request, SamplingParams, Score
from flexgen_lite.client.request import is_one_prompt, wire_prompt
from flexgen_lite.wire.client_messages import RequestDone, Submit, WireOutput, WirePrompt
from flexgen_lite.wire.sampling import TokenLogprobs
from tests.fake_engine import FakeEngine

pytestmark = pytest.mark.timeout(60)
HUGE = "x" * 100_000


def scored(message: Submit) -> list[RequestDone]:
    """Each token of a prompt of characters or ids has the logprob -1."""
    done = []
    for request in message.requests:
        ids = tuple(map(ord, request.prompt)) if isinstance(request.prompt, str) else request.prompt
        first = request.params.scored_from if request.context < 0 else max(1, request.context)
        logprobs = tuple(TokenLogprobs(-1.0, 1, ((ids[i], -1.0),)) for i in range(first, len(ids)))
        prompt = WirePrompt("", ids, logprobs)
        output = WireOutput("", (), "length")
        texts = {token: chr(token) for token in ids}
        done.append(RequestDone(message.job_id, request.index, len(ids), (output,), None, prompt, texts))
    return done


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    def answer(message: Submit) -> list[RequestDone] | None:
        return scored(message) if message.requests[0].params.max_tokens == 0 else None

    path = tmp_path_factory.mktemp("s") / "e"
    with FakeEngine(path, window=100, on_submit=answer) as engine, Client(engine.endpoint) as client:
        yield client


# ---------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    "ids",
    [
        [3, 4], (3, 4), range(3, 5), deque([3, 4]), array("q", [3, 4]), np.array([3, 4]), np.array([3, 4], np.uint8),
        torch.tensor([3, 4]), [np.int64(3), np.int32(4)], [torch.tensor(3), 4],
    ],
    ids=repr,
)  # fmt: skip
def test_token_ids_are_any_sequence_of_whole_numbers(ids: Any, client: Client) -> None:
    assert is_one_prompt(ids)
    assert wire_prompt("prompt 0", ids) == (3, 4)
    assert [done.token_ids for done in client.submit(ids)] == [[3, 4]]
    assert [done.token_ids for done in client.submit([ids, "a", ids]).results()] == [[3, 4], [0], [3, 4]]


@pytest.mark.parametrize(
    "rows", [np.array([[3, 4], [5, 6]]), torch.tensor([[3, 4], [5, 6]]), [np.array([3, 4]), torch.tensor([5, 6])]],
    ids=repr,
)  # fmt: skip
def test_rows_of_an_array_are_prompts(rows: Any, client: Client) -> None:
    assert [done.token_ids for done in client.submit(rows).results()] == [[3, 4], [5, 6]]


def test_an_array_of_one_number_is_a_prompt_and_no_number(client: Client) -> None:
    assert [done.token_ids for done in client.submit([torch.tensor([5]), np.array([6])]).results()] == [[5], [6]]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (None, "prompts is None: give a text, a list of token ids, or several of them"),
        (5, "prompts is an int"),
        (2.5, "prompts is a float"),
        (True, "prompts is True"),
        (b"text", "prompts is bytes"),
        (bytearray(b"text"), "prompts is a bytearray"),
        (memoryview(b"text"), "prompts is a memoryview"),
        ({"prompt": "text"}, "prompts is a dict"),
        ({"a", "b"}, "prompts is a set"),
        (np.int64(5), "prompts is an int64"),
        (["a", None], "prompt 1 is None: give a text or a list of token ids"),
        (["a", 5], "prompt 1 is an int"),
        (["a", b"b"], "prompt 1 is bytes"),
        (["a", {"prompt": "b"}], "prompt 1 is a dict"),
        (["a", "\ud800"], "prompt 1 has characters that are not Unicode text"),
        ([[5], [5, "a"]], "prompt 1 has 'a' among its token ids: give whole numbers from 0 to 2147483647"),
        ([[5], [5, HUGE]], "prompt 1 has 'xxx"),
        ([[5], [5, 1 << 31]], "prompt 1 has 2147483648 among its token ids: give whole numbers from 0 to 2147483647"),
        ([5, 10**5000], "prompt 0 has <a whole number of 16610 bits> among its token ids"),
        ([5, -1], "prompt 0 has -1 among its token ids"),
        ([5, True], "prompt 0 has True among its token ids"),
        ([5, 6.0], "prompt 0 has 6.0 among its token ids"),
        (np.array([0.5]), "prompt 0 is a float"),
        ([["a", "b"]], "prompt 0 has 'a' among its token ids"),
        ([{"role": "user", "content": "a"}], "prompt 0 is a dict"),
    ],
)  # fmt: skip
def test_prompts_that_are_none(prompts: Any, words: str, client: Client) -> None:
    refused(lambda: client.submit(prompts), words)


def test_a_generator_is_checked_as_it_comes(client: Client) -> None:
    job = client.submit(prompt for prompt in ("a", None))  # type: ignore[arg-type]
    refused(job.results, "prompt 1 is None: give a text or a list of token ids")


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert all(part in message for part in words) and len(message) < 300 and "\n" not in message, message


# ---------------------------------------------------------------------------------------------------- params, jobs


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (5, "params is an int: give SamplingParams, or one for each prompt"),
        ({"max_tokens": 5}, "params is a dict"),
        ("greedy", "params is a str"),
        ([SamplingParams(), None], "params 1 is None: give SamplingParams"),
        ([SamplingParams(), {"max_tokens": 5}], "params 1 is a dict"),
        ([SamplingParams()], "1 params for 2 prompts: give one, or one for each prompt"),
        ([], "0 params for 2 prompts"),
    ],
)
def test_params_that_are_none(params: Any, words: str, client: Client) -> None:
    refused(lambda: client.submit(["a", "b"], params), words)


@pytest.mark.parametrize(
    ("num_prompts", "num_params", "words"),
    [(3, 2, "params are shorter than prompts: they end after 2"), (2, 3, "prompts are shorter than params: they end")],
)
def test_params_of_another_number_found_late(num_prompts: int, num_params: int, words: str, client: Client) -> None:
    prompts = (f"p{number}" for number in range(num_prompts))
    refused(client.submit(prompts, (SamplingParams() for _ in range(num_params))).results, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"job_id": 5}, "job_id is an int"),
        ({"job_id": ""}, "job_id has 0 characters: give 1 to 200"),
        ({"job_id": HUGE}, "job_id has 100000 characters: give 1 to 200"),
        ({"job_id": "\ud800"}, "job_id has characters that are not Unicode text"),
        ({"priority": 1 << 63}, "priority=9223372036854775808 is not allowed: give a whole number from -9223372036854"),
        ({"priority": 1.5}, "priority=1.5 is not allowed"),
        ({"priority": None}, "priority=None is not allowed"),
        ({"keep": "yes"}, "keep is a str: give True or False"),
    ],
)
def test_a_job_that_cannot_be(options: dict[str, Any], words: str, client: Client) -> None:
    refused(lambda: client.submit("a", **options), words)
    assert client.submit("a", priority=np.int64(3)).results()[0].text == "A"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("a", None), "params of prompt 0 is None: give SamplingParams"),  # type: ignore[arg-type]
        (Request("a", SamplingParams(), echo="yes"), "echo of prompt 0 is 'yes': give True or False"),  # type: ignore[arg-type]
        (Request("a", SamplingParams(), scored_from=0), "scored_from=0 is not allowed: give a whole number from 1"),
        (Request("a", SamplingParams(), context=-5), "context=-5 is not allowed: give a whole number from 0"),
        (Request(None, SamplingParams()), "prompt 0 is None"),  # type: ignore[arg-type]
    ],
)
def test_a_request_that_the_engine_would_not_take_is_told_of(request_: Request, words: str, client: Client) -> None:
    """It would be dropped as a message that is none, and waited for in vain."""
    refused(client.submit_requests([request_]).results, words)


@pytest.mark.parametrize("prompt", [None, 5, ["a", "b"], {"prompt": "a"}, b"a", []])
def test_a_stream_takes_one_prompt(prompt: Any, client: Client) -> None:
    refused(lambda: client.stream(prompt), "prompt is ", "give one text or one list of token ids")


def test_a_stream_is_checked_before_it_is_read(client: Client) -> None:
    refused(lambda: client.stream("a", {"max_tokens": 5}), "params of prompt 0 is a dict")  # type: ignore[arg-type]
    refused(lambda: client.stream("a", priority="high"), "priority='high' is not allowed")  # type: ignore[arg-type]
    assert "".join(delta.text for delta in client.stream("a")) == "A"


# ---------------------------------------------------------------------------------------------------- chat

HELLO = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "messages is None: give a list of messages with a role and content, or several such lists"),
        (HELLO, "messages is a dict"),
        ("hello", "messages is a str"),
        (5, "messages is an int"),
        (["hello"], "conversation 0 is a str: give a list of messages"),
        ([[]], "conversation 0 has no messages: give at least one"),
        ([[HELLO], None], "conversation 1 is None"),
        ([HELLO, "hello"], "message 1 of conversation 0 is a str: give a dict with a role and content"),
        ([[HELLO], [HELLO, [HELLO]]], "message 1 of conversation 1 is a list"),
        ([{"content": "hello"}], 'message 0 of conversation 0 has no role, but content: give it one, such as "user"'),
        ([{HUGE: 1, "role": None}], "message 0 of conversation 0 has no role"),
        ([{}], "message 0 of conversation 0 has no role, but nothing"),
    ],
)
def test_messages_that_are_none(messages: Any, words: str, client: Client) -> None:
    refused(lambda: client.chat(messages, chat_template="{{ messages[0].content }}"), words)


@dataclass
class Message:
    content: str
    role: str | None = "user"


class Written(BaseModel):
    role: str = "user"
    content: str = "hello"


@pytest.mark.parametrize("message", [Message("hello"), Written()])
def test_messages_that_are_objects(message: Any, client: Client) -> None:
    template = "{{ messages[-1].content }}"
    for messages in ([message], [HELLO, message], [[message]], [[HELLO], [HELLO, message]]):
        job = client.chat(messages, chat_template=template)
        assert {done.text for done in job.results()} == {"HELLO"}
    refused(lambda: client.chat([message, Message("x", None)], chat_template=template), "message 1 of", "has no role")


def test_chat_params_that_are_none(client: Client) -> None:
    for params in ({"max_tokens": 5}, [SamplingParams()]):
        refused(lambda params=params: client.chat([HELLO], params), "params is a")  # type: ignore[misc]


def test_conversations_of_a_generator(client: Client) -> None:
    template = "{{ messages[0].content }}"
    job = client.chat((chat for chat in ([HELLO], [HELLO])), chat_template=template)
    assert [done.text for done in job.results()] == ["HELLO", "HELLO"]
    bad = client.chat((chat for chat in ([HELLO], [])), chat_template=template)
    refused(bad.results, "conversation 1 has no messages")


# ---------------------------------------------------------------------------------------------------- scores


def test_one_pair_is_one_score(client: Client) -> None:
    score = client.score("abc", "de")
    assert isinstance(score, Score) and score.token_ids == [ord("d"), ord("e")] and score.logprob == -2
    assert client.score([1, 2], [3, 4]) == client.score(np.array([1, 2]), torch.tensor([3, 4]))
    assert client.score("", " x").token_ids == [ord("x")]
    assert client.loglikelihood("abc").token_ids == [ord("b"), ord("c")]
    assert client.loglikelihood([1, 2]).token_ids == [2]


def test_several_pairs_are_several_scores(client: Client) -> None:
    assert [score.token_ids for score in client.score(["a"], ["b"])] == [[ord("b")]]
    generated = client.score((text for text in ("a", [1, 2])), iter(["b", [3]]))  # type: ignore[arg-type]
    assert [score.token_ids for score in generated] == [[ord("b")], [3]]
    assert client.score([], []) == client.loglikelihood([]) == []
    assert [score.token_ids for score in client.loglikelihood(["ab", [1, 2]])] == [[ord("b")], [2]]


@pytest.mark.parametrize(
    ("contexts", "continuations", "words"),
    [
        (["a", "b"], ["c"], "2 contexts for 1 continuations: give as many of the one as of the other"),
        (["a"], ["b", "c"], "1 contexts for 2 continuations"),
        ([], ["c"], "0 contexts for 1 continuations"),
        (["a", "b"], [], "2 contexts for 0 continuations"),
        ("a", ["b"], "contexts is one, continuations are several"),
        (["a"], "b", "continuations is one, contexts are several"),
        ([1, 2], [[3]], "contexts is one"),
        ("", ["b"], "contexts is one"),
        ("a", "", "continuation 0 is empty: give at least one token"),
        ("a", [4], "pair 0 is a text and a list of token ids: give two of a kind"),
        (None, None, "contexts is None: give a text, a list of token ids, or several of them"),
        (["a"], None, "continuations is None"),
        (5, 6, "contexts is an int"),
        ({"a": "b"}, {"c": "d"}, "contexts is a dict"),
        (b"a", b"b", "contexts is bytes"),
        (["a", None], ["b", "c"], "context 1 is None: give a text or a list of token ids"),
        (["a", "b"], ["b", 5], "continuation 1 is an int"),
        (["a", {"b": 1}], ["b", "c"], "context 1 is a dict"),
        (["a", b"b"], ["b", b"c"], "context 1 is bytes"),
        (["a", "b"], ["b", ""], "continuation 1 is empty"),
        (["a", "b"], ["b", []], "continuation 1 is empty"),
        (["a", []], ["b", [4]], "context 1 is empty"),
        (["a", [4]], ["b", "c"], "pair 1 is a text and a list of token ids"),
        (["a", [4]], ["b", [HUGE]], "continuation 1 has 'xxx"),
        (["\ud800"], ["b"], "context 0 has characters that are not Unicode text"),
    ],
)
def test_pairs_that_cannot_be(contexts: Any, continuations: Any, words: str, client: Client) -> None:
    refused(lambda: client.score(contexts, continuations), words)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (3, 2, "continuations are shorter than contexts: they end after 2; give one for each"),
        (2, 3, "contexts are shorter than continuations: they end after 2; give one for each"),
        (0, 1, "contexts are shorter than continuations: they end after 0"),
    ],
)
def test_unequal_generators_are_found_late(before: int, after: int, words: str, client: Client) -> None:
    refused(lambda: client.score((f"a{i}" for i in range(before)), ["b"] * after), words)
    refused(lambda: client.score(["a"] * before, (f"b{i}" for i in range(after))), words)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (None, "texts is None"),
        ("", "text 0 is empty: give at least one token"),
        ([5], "text 0 is a single token id, and the first is not scored: give at least two"),
        (["ab", None], "text 1 is None"),
        (["ab", ""], "text 1 is empty"),
        ([["a"]], "text 0 has 'a' among its token ids"),
        ({"a": 1}, "texts is a dict"),
    ],
)
def test_texts_that_cannot_be(texts: Any, words: str, client: Client) -> None:
    refused(lambda: client.loglikelihood(texts), words)


# ---------------------------------------------------------------------------------------------------- the engine's own


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [
        (None, None, "model is None: give a model directory or a hub id"),
        (5, None, "model is an int"),
        ("m", {"ram": "1GiB"}, "config is a dict: give an EngineConfig or the path of a YAML file"),
        ("m", 5, "config is an int"),
    ],
)
def test_an_engine_of_nothing(model: Any, config: Any, words: str) -> None:
    refused(lambda: FlexGenLite(model, config=config), words)
