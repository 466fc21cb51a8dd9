"""The official `openai` client, unchanged, with API keys that are good, that are used up and that nobody knows.

Called by tests/api_keys.rs as `api_keys.py BASE_URL MODEL GOOD LIMITED REVOKED`; LIMITED may ask twice a minute.
"""

import sys

import openai

BASE_URL, MODEL, GOOD, LIMITED, REVOKED = sys.argv[1:]
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


def client(key):
    return openai.OpenAI(base_url=BASE_URL, api_key=key, max_retries=0, timeout=100)


def ask(key, **kwargs):
    return client(key).chat.completions.with_raw_response.create(
        **{"model": MODEL, "messages": FRANCE, "temperature": 0, "max_tokens": 24, **kwargs}
    )


def refused(kind, key, **kwargs):
    try:
        ask(key, **kwargs)
    except kind as error:
        return error
    raise AssertionError("a request that was to be refused was answered")


assert [model.id for model in client(GOOD).models.list()] == [MODEL]
answer = ask(GOOD)
assert "Paris" in answer.parse().choices[0].message.content
assert "x-ratelimit-limit-requests" not in answer.headers
stream = client(GOOD).chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=24, stream=True)
assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in stream)

for key in ("sk-baton-nobody-has-it", REVOKED):
    error = refused(openai.AuthenticationError, key)
    assert error.status_code == 401 and error.code == "invalid_api_key", error
    assert error.type == "invalid_request_error" and key not in str(error), error
    try:
        client(key).models.list()
    except openai.AuthenticationError:
        pass
    else:
        raise AssertionError("the models were listed without a key")

for left in (1, 0):
    headers = ask(LIMITED, max_tokens=1).headers
    assert headers["x-ratelimit-limit-requests"] == "2", headers
    assert headers["x-ratelimit-remaining-requests"] == str(left), headers
    assert int(headers["x-ratelimit-remaining-tokens"]) < 5000 == int(headers["x-ratelimit-limit-tokens"]), headers
error = refused(openai.RateLimitError, LIMITED)
assert error.code == "rate_limit_exceeded" and error.type == "rate_limit_error", error
assert 1 <= int(error.response.headers["retry-after"]) <= 30, error.response.headers
assert error.response.headers["x-ratelimit-reset-requests"].endswith("s"), error.response.headers

# One that waits as it is told is served in the end.
patient = openai.OpenAI(base_url=BASE_URL, api_key=LIMITED, max_retries=2, timeout=100)
answer = patient.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=24)
assert "Paris" in answer.choices[0].message.content
