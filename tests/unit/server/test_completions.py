"""What clients get is what the model computes, in the form of OpenAI's API."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import torch

from megatron_kvshare import load_model
from megatron_kvshare.data.tokenizers import load_tokenizer
from tests.served import END, ROLE
from tests.unit.server.conftest import MODEL

TOLERANCE = 1e-4
HOT = {"temperature": 20.0}
GREEDY = {"temperature": 0, "ignore_eos": True}
TEXT = "shared keys, 日本語 🙂."


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return load_tokenizer("HuggingFaceTokenizer", str(folder))


@pytest.fixture(scope="module")
def logprobs(folder: Path, single):
    """``tokens -> [length, vocab]`` by the model's own definition, without a cache."""
    model = load_model(folder, device="cpu")
    return lambda ids: model.logits(torch.tensor([ids]), mode="exact")[0].log_softmax(-1)


def post(client, path: str = "/v1/completions", **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client, path: str = "/v1/completions", **body) -> list[dict]:
    """The chunks of a stream, which ends as it should."""
    answer = client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, end, rest = answer.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_tokens_and_log_probabilities_are_the_models(client, tokenizer, logprobs):
    answer = post(
        client, prompt=TEXT, max_tokens=9, echo=True, logprobs=3, return_token_ids=True, **GREEDY
    )
    (choice,) = answer["choices"]
    prompt, new = choice["prompt_token_ids"], choice["token_ids"]
    assert prompt == tokenizer.encode(TEXT) and len(new) == 9
    wanted = logprobs([*prompt, *new])[:-1]
    assert new == wanted[len(prompt) - 1 :].argmax(-1).tolist()
    told = choice["logprobs"]
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    own = wanted.gather(1, torch.tensor([[*prompt, *new][1:]]).T)[:, 0]
    assert (torch.tensor(told["token_logprobs"][1:]) - own).abs().max() <= TOLERANCE
    best = torch.tensor([max(top.values()) for top in told["top_logprobs"][1:]])
    assert (best - wanted.max(-1).values).abs().max() <= TOLERANCE
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 9,
        "total_tokens": len(prompt) + 9,
    }


def test_texts_and_offsets_belong_together(client, tokenizer):
    (choice,) = post(client, prompt=TEXT, max_tokens=6, echo=True, logprobs=0, **GREEDY)["choices"]
    told, text = choice["logprobs"], choice["text"]
    assert text.startswith(TEXT)
    lengths = {len(each) for each in told.values()}
    assert lengths == {len(tokenizer.encode(TEXT)) + 6}
    assert told["text_offset"] == sorted(told["text_offset"])
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert "\ufffd" in token or text[offset:].startswith(token)
    assert all(len(top) == 1 for top in told["top_logprobs"][1:])


def test_a_prompt_can_be_scored_alone(client, logprobs):
    prompt = [5, 70, 71, 300, 12]
    (choice,) = post(client, prompt=prompt, max_tokens=0, echo=True, logprobs=1)["choices"]
    wanted = logprobs(prompt)[:-1].gather(1, torch.tensor([prompt[1:]]).T)[:, 0]
    told = torch.tensor(choice["logprobs"]["token_logprobs"][1:])
    assert (told - wanted).abs().max() <= TOLERANCE
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", [[[5, 6, 7], [8, 9], [10]], ["shared", "keys", "and values"]])
def test_several_prompts_are_answered_as_each_alone(client, prompt):
    together = post(client, prompt=prompt, max_tokens=5, n=2, seed=11)["choices"]
    assert [choice["index"] for choice in together] == list(range(6))
    for number, one in enumerate(prompt):
        alone = post(client, prompt=one, max_tokens=5, seed=11)["choices"][0]["text"]
        second = post(client, prompt=one, max_tokens=5, seed=12)["choices"][0]["text"]
        texts = [choice["text"] for choice in together[2 * number : 2 * number + 2]]
        assert texts == [alone, second]


def test_a_seed_decides(client):
    asked = {"prompt": "keys", "max_tokens": 12, **HOT}
    texts = [post(client, **asked, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_text_before_it(client):
    asked = {"prompt": TEXT, "max_tokens": 24, "seed": 3, "ignore_eos": True, **HOT}
    (plain,) = post(client, **asked)["choices"]
    stop = plain["text"][5:8]
    (cut,) = post(client, **asked, stop=stop)["choices"]
    assert cut["text"] == plain["text"][: plain["text"].index(stop)]
    assert (plain["finish_reason"], cut["finish_reason"]) == ("length", "stop")


def test_the_token_that_ends_is_scored_but_not_shown(client):
    """lm-eval leaves out the last entry, the one new token's, whichever that is."""
    asked = {"prompt": [9, 10], "echo": True, "logprobs": 1, "max_tokens": 1, **GREEDY}
    (plain,) = post(client, **asked, return_token_ids=True)["choices"]
    (ended,) = post(client, **asked, stop_token_ids=plain["token_ids"])["choices"]
    assert ended["logprobs"] == plain["logprobs"]
    assert len(ended["logprobs"]["token_logprobs"]) == 3
    assert (plain["finish_reason"], ended["finish_reason"]) == ("length", "stop")
    assert plain["text"].startswith(ended["text"]) and plain["text"] != ended["text"]


class TestStreams:
    def test_chunks_add_up_to_the_whole(self, client):
        asked = {"prompt": [TEXT, "keys"], "max_tokens": 11, "n": 2, "seed": 4, **HOT}
        asked |= {"logprobs": 2, "echo": True, "return_token_ids": True}
        whole = post(client, **asked)
        chunks = events(client, **asked, stream_options={"include_usage": True})
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        for choice in whole["choices"]:
            parts = [c for x in chunks for c in x["choices"] if c["index"] == choice["index"]]
            assert "".join(part["text"] for part in parts) == choice["text"]
            assert [*chain(*(part["token_ids"] for part in parts))] == choice["token_ids"]
            prompts = [part.get("prompt_token_ids") for part in parts]
            assert prompts == [choice["prompt_token_ids"]] + [None] * (len(parts) - 1)
            for name, wanted in choice["logprobs"].items():
                assert [*chain(*(part["logprobs"][name] for part in parts))] == wanted
            reasons = [part["finish_reason"] for part in parts]
            assert reasons == [None] * (len(parts) - 1) + [choice["finish_reason"]]

    def test_of_a_chat(self, client):
        asked = {"messages": chat(TEXT), "max_completion_tokens": 11, "seed": 4}
        asked |= {"logprobs": True, "top_logprobs": 2, "ignore_eos": True, **HOT}
        path = "/v1/chat/completions"
        (whole,) = post(client, path, **asked)["choices"]
        first, *parts = [x["choices"][0] for x in events(client, path, **asked)]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert whole["message"]["content"] == "".join(x["delta"].get("content", "") for x in parts)
        content = [entry for part in parts for entry in part["logprobs"]["content"]]
        assert len(content) == 11
        for got, wanted in zip(content, whole["logprobs"]["content"], strict=True):
            assert (got["token"], got["bytes"]) == (wanted["token"], wanted["bytes"])
            # The second time, keys and values of the prompt are those of the first.
            assert abs(got["logprob"] - wanted["logprob"]) <= TOLERANCE
            assert got["bytes"] is None or bytes(got["bytes"]).decode() == got["token"]
        assert parts[-1]["finish_reason"] == whole["finish_reason"] == "length"

    def test_text_that_a_stop_string_may_still_cut_is_held_back(self, client):
        asked = {"prompt": TEXT, "max_tokens": 24, "seed": 3, "ignore_eos": True, **HOT}
        text = post(client, **asked)["choices"][0]["text"]
        stop = text[7:10]
        chunks = events(client, **asked, stop=[stop, "\x00never"])
        shown = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert shown == text[: text.index(stop)]


class TestChat:
    def test_the_template_makes_the_prompt(self, client, tokenizer):
        told = {"max_tokens": 4, "return_token_ids": True, **GREEDY}
        messages = [{"role": "system", "content": "be short"}, *chat("keys?")]
        answer = post(client, "/v1/chat/completions", messages=messages, **told)
        text = f"{ROLE}system: be short{END}{ROLE}user: keys?{END}{ROLE}assistant: "
        (choice,) = answer["choices"]
        assert choice["prompt_token_ids"] == tokenizer.encode(text)
        (plain,) = post(client, prompt=text, **told)["choices"]
        assert choice["message"]["content"] == plain["text"]
        assert choice["message"]["role"] == "assistant"
        assert answer["object"] == "chat.completion"

    def test_an_answer_can_be_sent_back(self, client):
        """With the empty keys that OpenAI's client writes."""
        answer = {"role": "assistant", "content": "yes", "refusal": None, "annotations": []}
        answer |= {"tool_calls": None, "function_call": None, "audio": None}
        parts = [{"type": "text", "text": "more"}, {"type": "text", "text": "?"}]
        messages = [*chat("keys?"), answer, {"role": "user", "content": parts}]
        told = post(client, "/v1/chat/completions", messages=messages, max_tokens=1)
        assert told["choices"][0]["finish_reason"] == "length"


def test_neutral_values_of_what_is_not_supported_are_taken(client):
    keys = {"best_of": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}}
    keys |= {"suffix": None, "user": "me", "model": MODEL, "seed": None, "stop": None}
    assert post(client, prompt="x", max_tokens=1, **keys)["model"] == MODEL


def test_models_and_health(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model == client.get(f"/v1/models/{MODEL}").json()
    assert (model["id"], model["max_model_len"]) == (MODEL, 512)
    assert client.get("/health").json() == {"status": "ok"}
    assert "/v1/completions" in client.get("/openapi.json").json()["paths"]


def test_metrics_count_what_has_happened(client):
    def number(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = ("kvshare_generated_tokens_total", 'kvshare_requests_total{reason="length"}')
    names += ("kvshare_prompt_tokens_total", "kvshare_time_to_first_token_seconds_count")
    names += ('kvshare_http_responses_total{path="/v1/completions",status="200"}',)
    before = [number(name) for name in names]
    post(client, prompt=[5, 6, 7], max_tokens=4, ignore_eos=True)
    client.get("/somewhere/else")
    gained = [number(name) - old for name, old in zip(names, before, strict=True)]
    assert gained == [4, 1, 3, 1, 1]
    assert number('kvshare_http_responses_total{path="other",status="404"}') >= 1
    assert number("kvshare_pages") == number("kvshare_free_pages") > 0
    assert number("kvshare_running") == number("kvshare_waiting") == 0
