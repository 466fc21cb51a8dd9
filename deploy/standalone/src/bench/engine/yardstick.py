"""llama.cpp as the yardstick of `baton bench engine`: the low-level interface of the package llama-cpp-python.

    yardstick.py quantize SOURCE TARGET TYPE     another weight type of a GGUF file
    yardstick.py serve MODEL THREADS TOKENS      measure, one line of JSON each: {"sequences", "prompt", "tokens", "seed"}
                                                 in, {"prefill_seconds", "decode_seconds"} out

Every sequence gets a prompt of random tokens; `prefill_seconds` is the time of all prompts one after the other,
`decode_seconds` that of `tokens` steps with a token of every sequence each, the choice of the likeliest token included.
"""

import ctypes
import json
import random
import sys
import time

import llama_cpp as llama

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15, "Q6_K": 18, "BF16": 32}


@llama.llama_log_callback
def quiet(level, text, user_data):
    pass


def quantize(source, target, kind):
    params = llama.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    params.allow_requantize = True
    params.nthread = 2
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) != 0:
        sys.exit(f"llama.cpp cannot make {kind} of {source}")


class Engine:
    """A model and one context with room for `tokens` tokens in all."""

    def __init__(self, path, threads, tokens):
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp cannot load {path}")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.threads = threads
        self.tokens = tokens
        self.contexts = {}

    def context(self, sequences):
        if sequences not in self.contexts:
            params = llama.llama_context_default_params()
            params.n_ctx = self.tokens * sequences
            params.n_batch = params.n_ubatch = 512
            params.n_seq_max = sequences
            params.n_threads = params.n_threads_batch = self.threads
            params.no_perf = True
            context = llama.llama_init_from_model(self.model, params)
            if not context:
                sys.exit("llama.cpp cannot make a context")
            self.contexts[sequences] = context
        return self.contexts[sequences]

    def measure(self, sequences, prompt, tokens, seed):
        context = self.context(sequences)
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        rng = random.Random(seed)
        prompts = [[rng.randrange(100, self.vocabulary) for _ in range(prompt)] for _ in range(sequences)]
        batch = llama.llama_batch_init(512, 0, 1)
        begin = time.perf_counter()
        following = []
        for sequence, ids in enumerate(prompts):
            for first in range(0, prompt, 512):
                piece = ids[first : first + 512]
                self.fill(batch, [(t, first + i, sequence, first + i == prompt - 1) for i, t in enumerate(piece)])
                self.decode(context, batch)
            following.append(self.likeliest(context, len(piece) - 1))
        prefilled = time.perf_counter()
        for step in range(tokens):
            self.fill(batch, [(t, prompt + step, sequence, True) for sequence, t in enumerate(following)])
            self.decode(context, batch)
            following = [self.likeliest(context, sequence) for sequence in range(sequences)]
        end = time.perf_counter()
        llama.llama_batch_free(batch)
        return {"prefill_seconds": prefilled - begin, "decode_seconds": end - prefilled}

    @staticmethod
    def fill(batch, rows):
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted

    @staticmethod
    def decode(context, batch):
        if llama.llama_decode(context, batch) != 0:
            sys.exit("llama.cpp cannot decode")

    def likeliest(self, context, row):
        import numpy

        logits = llama.llama_get_logits_ith(context, row)
        return int(numpy.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())


def main():
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    if sys.argv[1] == "quantize":
        return quantize(*sys.argv[2:5])
    engine = Engine(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    print(json.dumps({"version": llama.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(engine.measure(**json.loads(line))), flush=True)


main()
