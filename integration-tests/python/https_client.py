"""The official OpenAI client over HTTPS, with a certificate of its own, and those who are turned away.

Arguments: base URL, model, who signs the coordinator's certificate, the client's own certificate, and its key.
"""

import ssl
import sys

import httpx2 as httpx
import openai

URL, MODEL, CA, CERTIFICATE, KEY = sys.argv[1:]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def context(certificate=True, most=ssl.TLSVersion.TLSv1_3):
    made = ssl.create_default_context(cafile=CA)
    made.maximum_version = most
    if certificate:
        made.load_cert_chain(CERTIFICATE, KEY)
    return made


def client(**of):
    return openai.OpenAI(
        base_url=URL, api_key="none", max_retries=0, http_client=httpx.Client(verify=context(**of), trust_env=False)
    )


def ask(of, **more):
    return of.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=12, **more)


def is_refused(**of):
    try:
        ask(client(**of))
    except openai.APIConnectionError:
        return True
    return False


whole = ask(client()).choices[0].message.content
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client(), stream=True))
assert whole == streamed and "Paris" in whole, (whole, streamed)

left = ask(client(), stream=True, extra_body={"ignore_eos": True}, timeout=60)
next(iter(left))
left.close()

assert is_refused(certificate=False)
assert is_refused(most=ssl.TLSVersion.TLSv1_2)
plain = httpx.get(URL.replace("https://", "http://"), trust_env=False)
assert plain.status_code == 400 and "https://" in plain.text, plain.text
