"""What is learnt from servers' refusals: real ones, word by word, and those that teach nothing."""

import pytest

from telerag_cli.llm.base import Message, Request
from telerag_cli.llm.dialect import Dialect
from telerag_cli.llm.shapes import Choice

SYSTEM, USER, ASSISTANT = Message("system", "Be brief."), Message("user", "Which?"), Message("assistant", "This.")
TALK = (SYSTEM, USER)


def ask(messages=TALK, **options):
    return Request(messages, 8, **{"stop": ("END",), "logprobs": True, **options})


def learnt(dialect, request, *refusals, **more):
    """The body after these refusals, and how often something new was told."""
    news = []
    for said in refusals:
        body = dialect.body("small", request)
        news.append(dialect.learn(body, said, **more))
    return dialect.body("small", request), news


@pytest.mark.parametrize(
    ("said", "gone"),
    [
        ("Unsupported parameter: 'stream_options' is not supported with this model.", "stream_options"),
        ("[{'type': 'extra_forbidden', 'loc': ['body', 'seed'], 'msg': 'Extra inputs are not permitted'}]", "seed"),
        (
            "Unsupported value: 'temperature' does not support 0. Only the default (1) value is supported.",
            "temperature",
        ),
        ("`temperature` and `top_p` cannot both be specified for this model.", "top_p"),
        ("`top_p` must be > 0.0 and < 1.0", "top_p"),
        ("`temperature` must be strictly positive", "temperature"),
        ("Unrecognized request argument supplied: logprobs", "logprobs"),
        ("This model does not support log probabilities", "logprobs"),
        ("'stop' is not supported with this model", "stop"),
        ("Stop sequences are not supported", "stop"),
        ("Streaming is not supported for this model", "stream"),
        ("Your organization must be verified; 'stream' is not available", "stream"),
        ("got an unexpected keyword argument 'seed'", "seed"),
    ],
)
def test_a_parameter_that_is_refused_is_left_out_and_told_once(said, gone):
    dialect = Dialect()
    before = dialect.body("small", ask())
    assert gone in before
    body, (news,) = learnt(dialect, ask(), said)
    assert gone in news or gone == "stream"
    also = {"stream": {"stream_options"}, "logprobs": {"top_logprobs"}}.get(gone, set())
    assert before.keys() - body.keys() == {gone} | also
    assert dialect.learn(before, said) == ""  # another request was under way
    assert gone not in (dialect.learn(body, said) or "")


def test_a_value_of_ones_own_is_not_dropped_for_everybody():
    dialect = Dialect()
    said = "temperature must be less than or equal to 2"
    assert dialect.learn(dialect.body("small", ask(temperature=9.0)), said) is None
    dialect.learn(dialect.body("small", ask()), "top_p must be in (0, 1)")
    assert "top_p" not in dialect.body("small", ask())
    assert dialect.body("small", ask(top_p=0.5))["top_p"] == 0.5


def test_max_tokens_is_renamed():
    said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    dialect = Dialect()
    body, (news,) = learnt(dialect, ask(), said)
    assert news
    assert (body.get("max_tokens"), body["max_completion_tokens"]) == (None, 8)
    assert dialect.learn(body, "max_completion_tokens is not supported") is None
    assert Dialect().learn(Dialect().body("small", ask()), "max_tokens is too large: 8. It supports at most 4") is None


@pytest.mark.parametrize("said", ["Unknown parameter in request", "Bad Request", "Error code: 422", "400 Bad Request."])
def test_a_parameter_without_a_name_is_looked_for(said):
    body, news = learnt(Dialect(), ask(), *[said] * 9)
    assert [bool(told) for told in news] == [True] * 5 + [False] * 4
    assert body.keys() == {"model", "messages", "max_tokens", "temperature", "stop", "stream"}


@pytest.mark.parametrize(
    "said",
    [
        "System role not supported",
        "Developer instruction is not enabled for models/gemma-3-27b-it",
        "[{'loc': ['body', 'messages', 0, 'role'], 'msg': \"Input should be 'user' or 'assistant'\"}]",
        "Only user and assistant roles are supported!",
        "Unexpected role: system",
        "Conversation roles must alternate user/assistant/user/assistant/...",
    ],
)
def test_a_system_message_that_is_refused_goes_into_the_users_turn(said):
    dialect = Dialect()
    body, (news,) = learnt(dialect, ask((SYSTEM, USER, ASSISTANT, USER)), said)
    assert news
    assert body["messages"] == [
        {"role": "user", "content": "Be brief.\n\nWhich?"},
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": "Which?"},
    ]
    assert dialect.learn(body, said) is None


def test_roles_that_must_alternate():
    said = 'roles must alternate between "user" and "assistant", but found multiple "user" roles in a row'
    body, _news = learnt(Dialect(), ask((SYSTEM, USER, USER)), said)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    body, _news = learnt(Dialect(), ask((SYSTEM, USER, USER)), said, said)
    assert body["messages"] == [{"role": "user", "content": "Be brief.\n\nWhich?\n\nWhich?"}]


@pytest.mark.parametrize(
    "said",
    [
        "Bad seed",
        "The model is not available",
        "system error message",
        "Incorrect API key provided",
        "Your stop is near",
        "The upstream closed the stream",
    ],
)
def test_other_refusals_change_nothing(said):
    dialect = Dialect()
    body = dialect.body("small", ask())
    assert dialect.learn(body, said) is None
    assert dialect.body("small", ask()) == body


def test_a_failure_of_the_server_takes_no_streams_away():
    dialect = Dialect()
    body = dialect.body("small", ask())
    assert dialect.learn(body, "unexpected end: streaming is not supported", broken=True) is None
    assert dialect.learn(body, "unexpected keyword argument 'top_p'", broken=True)


def test_a_schema_in_the_older_form():
    dialect = Dialect()
    request = ask(shape=Choice(("yes",)))
    body, (news,) = learnt(dialect, request, "Input should be 'text' or 'json_object', not 'json_schema'")
    assert news
    assert body["response_format"] == {"type": "json_object", "schema": Choice(("yes",)).json_schema()}
