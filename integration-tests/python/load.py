"""Load by the official OpenAI client over HTTPS, which goes on until its standard input closes.

Arguments: base URLs of the coordinators with commas between, model, who signs their certificates, API key, and the clients' own
certificate and its key, if they are asked for one. Every answer has to be that of the beginning, when nothing was disturbed. What a
coordinator that dies was at, or that says it ends, is sent again, to another, as whoever stands before several coordinators does;
whatever else fails is a failure. Prints one JSON object at the end; and one at each line that it reads, of what ended since the one
before.
"""

import json
import ssl
import sys
import threading
import time

import httpx2 as httpx
import openai

URLS, (MODEL, CA, KEY, *OWN) = sys.argv[1].split(","), sys.argv[2:]
CLIENTS = 6
# In a row, for one request, of which each may meet another fault.
ATTEMPTS = 5
# What a coordinator says that ends, and no other.
ENDS = "this coordinator is shutting down"
PROMPTS = [
    "Write a story about a lighthouse keeper who finds a letter.",
    "Explain how bread rises.",
    "List ten animals that live in the sea, and say something about each.",
    "What would you pack for a journey to the moon?",
]
# Sampled, too: an answer that moves goes on as it would have.
SAMPLING = [{"temperature": 0}, {"temperature": 0.8, "seed": 7, "top_p": 0.9}]

context = ssl.create_default_context(cafile=CA)
if OWN:
    context.load_cert_chain(*OWN)
lock, stop = threading.Lock(), threading.Event()


def nothing():
    return {"ended": 0, "requests": 0, "again": 0, "failed": [], "wrong": [], "longest_pause_s": 0.0, "longest_s": 0.0}


told = nothing()


def clients():
    connect = {"verify": context, "trust_env": False, "timeout": httpx.Timeout(120, connect=3)}
    return [openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, http_client=httpx.Client(**connect)) for url in URLS]


def ask(client, prompt, sampling):
    """The text of a streamed answer, and the longest pause in it."""
    asked = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": prompt}], max_tokens=96, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True}, **sampling,
    )
    text, usage, pause, before = "", None, 0.0, time.monotonic()
    for chunk in asked:
        now = time.monotonic()
        pause, before = max(pause, now - before), now
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    if usage is None:
        raise httpx.RemoteProtocolError("the stream ended before its usage")
    if usage.completion_tokens != 96:
        raise ValueError(f"{usage.completion_tokens} tokens instead of 96")
    return text, pause


def expected():
    one = clients()[0]
    return {(p, s): ask(one, prompt, sampling)[0] for p, prompt in enumerate(PROMPTS) for s, sampling in enumerate(SAMPLING)}


def work(number, wanted):
    own, at = clients(), number
    while not stop.is_set():
        p, s = at % len(PROMPTS), at // len(PROMPTS) % len(SAMPLING)
        begun, troubles = time.monotonic(), []
        while True:
            try:
                text, pause = ask(own[at % len(own)], PROMPTS[p], SAMPLING[s])
                break
            except (openai.APIConnectionError, httpx.TransportError) as error:
                # The coordinator is gone, or about to be: another has it.
                troubles.append(f"{type(error).__name__}: {error.__cause__ or error}")
            except Exception as error:  # An error in a stream, a refusal, a wrong count: none of them may be.
                troubles.append(f"{type(error).__name__}: {error}")
                if ENDS not in str(error):
                    pause, text = 0.0, None
                    break
            if len(troubles) == ATTEMPTS:
                text, pause = None, 0.0
                break
            at += 1
            time.sleep(0.5)
        if troubles:
            print(time.strftime("%H:%M:%S"), *troubles, sep="\n  ", file=sys.stderr, flush=True)
        with lock:
            told["requests"] += 1
            told["again"] += len(troubles) if text is not None else 0
            told["longest_pause_s"] = max(told["longest_pause_s"], pause)
            told["longest_s"] = max(told["longest_s"], time.monotonic() - begun)
            if text is None:
                told["failed"].append(troubles)
            elif text != wanted[p, s]:
                told["wrong"].append([p, s, text, wanted[p, s]])
        at += 1
    with lock:
        told["ended"] += 1


wanted = expected()
print("loading", flush=True)
threads = [threading.Thread(target=work, args=(number, wanted)) for number in range(CLIENTS)]
for thread in threads:
    thread.start()
for _ in sys.stdin:
    with lock:
        print(json.dumps(told), flush=True)
        told = nothing()
stop.set()
for thread in threads:
    thread.join()
print(json.dumps(told), flush=True)
