"""``kvshare serve`` as its users run it: a process, clients of others, thousands of requests."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import httpx2
import pytest

from megatron_kvshare.sharing.patterns import build_map
from tests.integration import side_packages
from tests.integration.serving_process import Served
from tests.integration.soak import Soak
from tests.served import SMALL, write_served

LONG = SMALL.but(extra={"seq_length": 512})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served(tmp_path_factory.mktemp("served") / "tiny", tiny=LONG)


@pytest.mark.nightly
def test_two_thousand_requests(folder: Path) -> None:
    """Of random lengths, some left, some wrong, some not read: memory is flat, none is lost, none
    answered twice, and at the end TERM lets open ones finish."""
    flags = ["--max-batch-size", "8", "--max-queue", "24", "--page-size", "16"]
    flags += ["--stall-seconds", "3", "--max-body-mb", "0.1", "--cache-tokens", "2048"]
    with Served(folder, *flags) as served:
        soak = Soak(served, vocabulary=SMALL.vocabulary, requests=2000)
        soak.run()
        print(soak.report())
        soak.check()
        with httpx2.Client(base_url=served.url, timeout=300) as client:
            answers = []
            asked = {"prompt": [5, 6], "max_tokens": 300, "ignore_eos": True}
            threads = [
                threading.Thread(
                    target=lambda: answers.append(client.post("/v1/completions", json=asked))
                )
                for _ in range(6)
            ]
            for thread in threads:
                thread.start()
            while served.metric("kvshare_running") < 6:
                pass
            served.terminate()
            for thread in threads:
                thread.join()
        assert [a.json()["usage"]["completion_tokens"] for a in answers] == [300] * 6
        assert served.wait() == 0
    assert "Traceback" not in served.errors


OPENAI = """
import json, sys
import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="secret", max_retries=0)
(model,) = client.models.list().data
greedy = {"model": model.id, "temperature": 0, "max_tokens": 6, "extra_body": {"ignore_eos": True}}
whole = client.completions.create(prompt="shared keys", **greedy)
parts = list(
    client.completions.create(
        prompt="shared keys", stream=True, stream_options={"include_usage": True}, **greedy
    )
)
assert "".join(c.text for p in parts for c in p.choices) == whole.choices[0].text
assert parts[-1].usage == whole.usage
scored = client.completions.create(prompt=[5, 6, 7], logprobs=2, echo=True, **greedy).choices[0]
assert len(scored.logprobs.token_logprobs) == 9
messages = [{"role": "user", "content": "keys?"}]
chat = client.chat.completions.create(
    messages=messages, logprobs=True, top_logprobs=2, n=2, **greedy
)
assert len(chat.choices[1].logprobs.content) == 6
messages += [chat.choices[0].message, {"role": "user", "content": "more"}]
deltas = list(client.chat.completions.create(messages=messages, stream=True, **greedy))
again = client.chat.completions.create(messages=messages, **greedy)
text = "".join(d.choices[0].delta.content or "" for d in deltas)
assert text == again.choices[0].message.content
told = []
for wrong in ({"best_of": 3}, {"temperature": 101}, {"prompt": [10**9]}, {"model": "other"}):
    try:
        client.completions.create(**{"prompt": "x", **greedy, **wrong})
    except openai.APIStatusError as error:
        told.append([type(error).__name__, error.body["param"]])
try:
    openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="wrong", max_retries=0).models.list()
except openai.APIStatusError as error:
    told.append([type(error).__name__, error.body["code"]])
try:
    for part in client.completions.create(prompt=[5] * 600, stream=True, **greedy):
        pass
except openai.APIStatusError as error:
    told.append([type(error).__name__, error.body["param"]])
with client.completions.create(
    prompt="keys", model=model.id, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
) as stream:
    next(iter(stream))
print(json.dumps(told))
"""


@pytest.mark.nightly
@pytest.mark.download
def test_openais_client(folder: Path, tmp_path: Path) -> None:
    packages = side_packages.install("openai", "openai==3.57.0", dependencies=True)
    (tmp_path / "client.py").write_text(OPENAI)
    with Served(folder, "--api-key", "secret", "--page-size", "16") as served:
        told = json.loads(side_packages.run(packages, tmp_path / "client.py", served.url))
        assert told == [
            ["BadRequestError", None],
            ["BadRequestError", "temperature"],
            ["BadRequestError", "prompt"],
            ["NotFoundError", "model"],
            ["AuthenticationError", "invalid_api_key"],
            ["BadRequestError", "prompt"],
        ]


LM_EVAL = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

url, folder = sys.argv[1:]
texts = ["shared keys and values", "make a small", "naïve café, 日本語 🙂. values", "keys"]
pairs = [(a, " " + b) for a in texts for b in texts]
until = {"until": [";", " v"], "max_gen_toks": 24, "do_sample": False}

def asked(kind, arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]

def scores(model):
    return {
        "pairs": model.loglikelihood(asked("loglikelihood", pairs)),
        "texts": model.loglikelihood_rolling(asked("loglikelihood_rolling", [(t,) for t in texts])),
        "written": model.generate_until(asked("generate_until", [(t, until) for t in texts])),
    }

served = {"model": "plain", "tokenizer": folder, "max_length": 512, "batch_size": 3}
served |= {"base_url": url + "/v1/completions", "tokenizer_backend": "huggingface"}
print(json.dumps([
    scores(LocalCompletionsAPI(**served)),
    scores(LocalCompletionsAPI(**served, num_concurrent=4)),
    scores(HFLM(pretrained=folder, device="cpu", batch_size=1, max_length=512)),
]))
"""


@pytest.mark.nightly
@pytest.mark.download
def test_lm_eval_scores_the_server_as_the_model_itself(tmp_path: Path) -> None:
    """By its ``local-completions``: log-probabilities, greedy flags and greedy texts."""
    packages = side_packages.install("lm-eval", "lm_eval==0.4.13", "accelerate", dependencies=True)
    more = side_packages.install("lm-eval-api", "tenacity==9.2.1")
    folder = write_served(tmp_path / "plain", build_map(4, "standard"), LONG)
    (tmp_path / "client.py").write_text(LM_EVAL)
    with Served(folder, "--page-size", "16") as served:
        arguments = (tmp_path / "client.py", served.url, folder)
        told = side_packages.run(packages, *arguments, beside=[more]).splitlines()[-1]
    one_by_one, together, wanted = json.loads(told)
    for found in (one_by_one, together):
        assert found["written"] == wanted["written"]
        assert [greedy for _, greedy in found["pairs"]] == [g for _, g in wanted["pairs"]]
        sums = [x for x, _ in found["pairs"]] + found["texts"]
        for got, right in zip(sums, [x for x, _ in wanted["pairs"]] + wanted["texts"], strict=True):
            assert abs(got - right) <= 1e-3 * max(1, abs(right))
