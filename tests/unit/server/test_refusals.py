"""A request that is wrong is told what is wrong with it, and never an error of the server."""

from __future__ import annotations

import json
from typing import Any

import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
USER = {"role": "user", "content": "hello"}


def completion(**keys: Any) -> dict[str, Any]:
    return {"prompt": "hello", "max_tokens": 2, **keys}


def chat(*messages: Any, **keys: Any) -> dict[str, Any]:
    return {"messages": list(messages or [USER]), "max_tokens": 2, **keys}


TEXTS = {
    "nothing": (b"", 400, "no body"),
    "a word": (b"hello", 400, "no JSON"),
    "half an object": (b'{"prompt": "x"', 400, "no JSON"),
    "a list": (b'["x"]', 400, "valid dictionary"),
    "a number": (b"7", 400, "valid dictionary"),
    "null": (b"null", 400, "valid dictionary"),
    "other bytes": (b'{"prompt": "\xff\xfe"}', 400, "body"),
    "a deep nest": (b'{"prompt": ' + b"[" * 100_000, 400, "body"),
    "a very long number": (b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}", 400, "body"),
    "not a number": (b'{"prompt": "x", "temperature": NaN}', 400, "temperature"),
    "infinity": (b'{"prompt": "x", "temperature": Infinity}', 400, "temperature"),
    "half a character": (b'{"prompt": "\\ud800"}', 400, "surrogate"),
    "half a character as key": (b'{"prompt": "x", "\\udfff": 1}', 400, "no key"),
    "half a character as model": (b'{"prompt": "x", "model": "\\ud800"}', 404, "model"),
}
BODIES = {
    "no prompt": (COMPLETIONS, {"max_tokens": 2}, "prompt"),
    "an empty prompt": (COMPLETIONS, completion(prompt=""), "at least one token"),
    "no prompts": (COMPLETIONS, completion(prompt=[]), "a prompt is a text"),
    "no tokens": (COMPLETIONS, completion(prompt=[[]]), "at least one token"),
    "an object as prompt": (COMPLETIONS, completion(prompt={"a": 1}), "a prompt is a text"),
    "texts and tokens": (COMPLETIONS, completion(prompt=["a", 1]), "a prompt is a text"),
    "truth as token": (COMPLETIONS, completion(prompt=[1, True]), "a prompt is a text"),
    "a part of a token": (COMPLETIONS, completion(prompt=[1.5]), "a prompt is a text"),
    "a nest of tokens": (COMPLETIONS, completion(prompt=[[[1]]]), "a prompt is a text"),
    "a token too high": (COMPLETIONS, completion(prompt=[320], echo=True), "0 to 319"),
    "a token below 0": (COMPLETIONS, completion(prompt=[-1], echo=True), "0 to 319"),
    "an enormous token": (COMPLETIONS, completion(prompt=[10**30]), "0 to 319"),
    "a second prompt too long": (COMPLETIONS, completion(prompt=["a", "b " * 999]), "at most 512"),
    "a prompt too long": (COMPLETIONS, completion(prompt=[5] * 512), "at most 512"),
    "more prompts than places": (COMPLETIONS, completion(prompt=["a"] * 13), "12"),
    "more choices than places": (COMPLETIONS, completion(n=13), "12"),
    "no choices": (COMPLETIONS, completion(n=0), "n"),
    "fewer than no tokens": (COMPLETIONS, completion(max_tokens=-1), "max_tokens"),
    "tokens as text": (COMPLETIONS, completion(max_tokens="5"), "max_tokens"),
    "a part of max_tokens": (COMPLETIONS, completion(max_tokens=1.5), "max_tokens"),
    "truth as max_tokens": (COMPLETIONS, completion(max_tokens=True), "max_tokens"),
    "enormous max_tokens": (COMPLETIONS, completion(max_tokens=10**30), "max_tokens"),
    "cold below 0": (COMPLETIONS, completion(temperature=-0.1), "temperature"),
    "too hot": (COMPLETIONS, completion(temperature=1e9), "temperature"),
    "top_p above 1": (COMPLETIONS, completion(top_p=1.01), "top_p"),
    "top_p of 0": (COMPLETIONS, completion(top_p=0), "top_p"),
    "top_k below 0": (COMPLETIONS, completion(top_k=-1), "top_k"),
    "min_p above 1": (COMPLETIONS, completion(min_p=2), "min_p"),
    "no repetition_penalty": (COMPLETIONS, completion(repetition_penalty=0), "repetition_penalty"),
    "a seed below 0": (COMPLETIONS, completion(seed=-1), "seed"),
    "an enormous seed": (COMPLETIONS, completion(seed=2**63), "seed"),
    "too many logprobs": (COMPLETIONS, completion(logprobs=21), "logprobs"),
    "logprobs of a chat": (COMPLETIONS, completion(logprobs=True), "logprobs"),
    "an empty stop string": (COMPLETIONS, completion(stop=["a", ""]), "stop"),
    "numbers as stop strings": (COMPLETIONS, completion(stop=[1]), "stop"),
    "many stop strings": (COMPLETIONS, completion(stop=["a"] * 17), "stop"),
    "a stop token below 0": (COMPLETIONS, completion(stop_token_ids=[-1]), "stop_token_ids"),
    "yes as stream": (COMPLETIONS, completion(stream="yes"), "stream"),
    "options of no stream": (COMPLETIONS, completion(stream_options={}), "stream_options"),
    "odd options of a stream": (
        COMPLETIONS,
        completion(stream=True, stream_options={"include": 1}),
        "include",
    ),
    "a stream too long": (COMPLETIONS, completion(stream=True, prompt=[5] * 600), "at most 512"),
    "best_of": (COMPLETIONS, completion(best_of=3), "not ranked"),
    "suffix": (COMPLETIONS, completion(suffix="end"), "forward only"),
    "logit_bias": (COMPLETIONS, completion(logit_bias={"5": 1}), "logit_bias"),
    "presence_penalty": (COMPLETIONS, completion(presence_penalty=0.5), "repetition_penalty"),
    "truth as penalty": (COMPLETIONS, completion(frequency_penalty=False), "frequency_penalty"),
    "an unknown key": (COMPLETIONS, completion(temprature=1), "'temprature' is no key"),
    "many unknown keys": (COMPLETIONS, completion(**{f"k{i}": 1 for i in range(99)}), "94 more"),
    "messages as prompt": (COMPLETIONS, chat(), "'messages' is no key"),
    "a prompt as chat": (CHAT, completion(), "'prompt' is no key"),
    "no messages": (CHAT, {"messages": []}, "messages"),
    "text as messages": (CHAT, {"messages": "hello"}, "messages"),
    "text as a message": (CHAT, chat("hello"), "messages.0"),
    "a message of nothing": (CHAT, chat({}), "messages.0.role"),
    "a message without content": (CHAT, chat({"role": "user"}), "content"),
    "a role of its own": (CHAT, chat({"role": "judge", "content": "x"}), "messages.0.role"),
    "a picture": (
        CHAT,
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        "messages.0.content",
    ),
    "a second system": (CHAT, chat(USER, {"role": "system", "content": "x"}), "speaks first"),
    "tools": (CHAT, chat(tools=[{"type": "function"}]), "tools are not supported"),
    "a tool's call": (
        CHAT,
        chat({"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}),
        "tools are not supported",
    ),
    "an answer as JSON": (CHAT, chat(response_format={"type": "json_object"}), "free text"),
    "both names of a limit": (CHAT, chat(max_completion_tokens=2), "give one"),
    "top_logprobs alone": (CHAT, chat(top_logprobs=2), "top_logprobs needs"),
    "logprobs as a number": (CHAT, chat(logprobs=2), "logprobs"),
}


def reason(answer, status: int) -> str:
    """The message, in OpenAI's format."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 2100
    return error["message"]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_is_no_request(name, path, client):
    content, status, told = TEXTS[name]
    answer = client.post(path, content=content, headers=JSON)
    if path == COMPLETIONS:
        assert told in reason(answer, status)
    else:
        reason(answer, answer.status_code if answer.status_code in (400, 404) else 400)


@pytest.mark.parametrize("name", BODIES)
def test_what_is_wrong_is_named(name, client):
    path, body, told = BODIES[name]
    assert told in reason(client.post(path, json=body), 400)


def test_there_are_enough():
    assert len(TEXTS) + len(BODIES) >= 40


def test_faults_are_told_together(client):
    body = completion(best_of=2, foo=1, suffix="x")
    found = reason(client.post(COMPLETIONS, json=body), 400)
    assert all(key in found for key in ("best_of", "foo", "suffix"))
    body = completion(temperature="x", top_p="y", n=0)
    found = reason(client.post(COMPLETIONS, json=body), 400)
    assert all(key in found for key in ("temperature", "top_p", "n:"))
    found = reason(client.post(COMPLETIONS, json=completion(top_p=2, min_p=2)), 400)
    assert "top_p" in found and "min_p" in found


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_must_be_declared_as_json(kind, client):
    """A web page can make a browser send others to this machine without asking."""
    headers = {} if kind is None else {"Content-Type": kind}
    answer = client.post(COMPLETIONS, content=json.dumps(completion()), headers=headers)
    assert "application/json" in reason(answer, 415)


def test_other_paths_methods_and_models(client):
    assert "/v1/embeddings" in reason(client.post("/v1/embeddings", json={}), 404)
    assert "GET /v1/completions" in reason(client.get(COMPLETIONS), 405)
    assert "'tiny'" in reason(client.post(COMPLETIONS, json=completion(model="gpt")), 404)
    assert "'tiny'" in reason(client.get("/v1/models/gpt"), 404)


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_many_faults_of_one_list_are_no_work(kind, client):
    """Whoever sends a million wrong things is not sent a million reasons."""
    body = {"prompt": [[None] * 10**6]} if kind == "prompt" else {"messages": [7] * 10**6}
    path = COMPLETIONS if kind == "prompt" else CHAT
    assert len(reason(client.post(path, json=body), 400)) < 300
