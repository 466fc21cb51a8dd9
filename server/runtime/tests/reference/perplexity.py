#!/usr/bin/env python3
"""llama.cpp's perplexity of perplexity/text.txt, by the low-level interface of the package llama-cpp-python.

    perplexity.py write MODEL.gguf       # writes perplexity/perplexity.json, a minute
    perplexity.py print MODEL.gguf...    # tells llama.cpp's perplexity with each file, writes nothing

Run it with a Python that has llama-cpp-python 0.3.36 and numpy: `deploy/run bench engine` builds both for this very
CPU and leaves that Python as .cache/bin/llama-python. What perplexity is stands in the README beside this file.

Each file is measured as it is and once more with its weights written out as F32, into a temporary file. llama.cpp
rounds activations to what suits the weights: to 8 bits where these are quantised, not at all where they are F32. The
second figure is that of the weights alone.
"""

import argparse
import ctypes
import json
import math
import tempfile
from pathlib import Path

import llama_cpp as llama
import numpy as np

HERE = Path(__file__).resolve().parent / "perplexity"
WINDOW = 512
THREADS = 2


@llama.llama_log_callback
def quiet(level, text, user_data):
    pass


class Model:
    """A GGUF file and one context with room for a window: everything in it as llama.cpp has it by default."""

    def __init__(self, path):
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = WINDOW
        params.n_threads = params.n_threads_batch = THREADS
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp cannot make a context")
        self.vocabulary = llama.llama_model_get_vocab(self.model)

    def close(self):
        llama.llama_free(self.context)
        llama.llama_model_free(self.model)

    def windows(self, text):
        """The tokens of a text, cut into windows; no token is put before them."""
        data = text.encode()
        tokens = (llama.llama_token * len(data))()
        count = llama.llama_tokenize(self.vocabulary, data, len(data), tokens, len(tokens), False, False)
        return [tokens[first : min(first + WINDOW, count)] for first in range(0, count, WINDOW)]

    def perplexity(self, windows):
        surprises = [surprise for window in windows for surprise in self.surprises(window)]
        return math.exp(math.fsum(surprises) / len(surprises))

    def surprises(self, window):
        """Minus the log probability of each token but the first, all computed as one prompt from an empty cache."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        batch = llama.llama_batch_init(WINDOW, 0, 1)
        batch.n_tokens = len(window)
        for position, token in enumerate(window):
            batch.token[position] = token
            batch.pos[position] = position
            batch.n_seq_id[position] = 1
            batch.seq_id[position][0] = 0
            batch.logits[position] = True
        if llama.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama.cpp cannot decode")
        llama.llama_batch_free(batch)
        return [self.surprise(position, token) for position, token in enumerate(window[1:])]

    def surprise(self, position, token):
        shape = (llama.llama_vocab_n_tokens(self.vocabulary),)
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(self.context, position), shape=shape)
        logits = logits.astype(np.float64)
        most = logits.max()
        return most + math.log(np.exp(logits - most).sum()) - logits[token]


def measure(path):
    """The windows of the text, its perplexity with a file, and that with the file's weights as F32."""
    text = (HERE / "text.txt").read_text()
    with tempfile.TemporaryDirectory() as directory:
        plain = str(Path(directory) / "f32.gguf")
        write_out(path, plain)
        figures = []
        for file in (path, plain):
            model = Model(file)
            windows = model.windows(text)
            figures.append(model.perplexity(windows))
            model.close()
    return windows, *figures


def write_out(source, target):
    params = llama.llama_model_quantize_default_params()
    params.ftype = llama.LLAMA_FTYPE_ALL_F32
    params.allow_requantize = True
    params.nthread = THREADS
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama.cpp cannot write the weights of {source} out")


def write(path):
    windows, perplexity, exact = measure(path)
    result = dict(
        model=Path(path).stem,
        by=f"llama-cpp-python {llama.__version__}",
        perplexity=float(f"{perplexity:.6g}"),
        exact=float(f"{exact:.6g}"),
        windows=windows,
    )
    (HERE / "perplexity.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")
    print(f"{sum(map(len, windows))} tokens in {len(windows)} windows: {perplexity:.4f}, as F32 {exact:.4f}")


def tell(paths):
    written = json.loads((HERE / "perplexity.json").read_text())["windows"]
    print(f"{'':<40} {'as it is':>10} {'as F32':>10}")
    for path in paths:
        windows, perplexity, exact = measure(path)
        if windows != written:
            raise SystemExit(f"{path} has another tokenizer than the file that perplexity.json was written with")
        print(f"{Path(path).stem:<40} {perplexity:>10.4f} {exact:>10.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("write", help="write perplexity.json").add_argument("model")
    parts.add_parser("print", help="tell the perplexity with each file").add_argument("models", nargs="+")
    arguments = parser.parse_args()
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    if arguments.part == "write":
        write(arguments.model)
    else:
        tell(arguments.models)


if __name__ == "__main__":
    main()
