"""The official `openai` client, unchanged, asking two models of one Baton at once.

Called by tests/models.rs as `two_models.py BASE_URL MODEL OTHER_MODEL`; MODEL is SmolLM2, the other has random weights.
"""

import concurrent.futures
import sys

import openai

BASE_URL, REAL, TINY = sys.argv[1:]
CLIENT = openai.OpenAI(base_url=BASE_URL, api_key="unused", max_retries=0, timeout=100)
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


def ask(model):
    """Text of a stream, and that all of it came from the model that was asked."""
    stream = CLIENT.chat.completions.create(model=model, messages=FRANCE, temperature=0, max_tokens=24, stream=True)
    chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {model}, chunks
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


assert [model.id for model in CLIENT.models.list()] == [REAL, TINY]
assert CLIENT.models.retrieve(TINY).id == TINY

asked = [REAL, TINY] * 6
with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
    answers = list(pool.map(ask, asked))
of_real, of_tiny = set(answers[::2]), set(answers[1::2])
assert len(of_real) == len(of_tiny) == 1, answers
assert "Paris" in answers[0] and of_real != of_tiny, answers

try:
    ask("another")
except openai.NotFoundError as error:
    assert error.code == "model_not_found" and REAL in str(error) and TINY in str(error), error
else:
    raise AssertionError("a model that is not served has answered")
