"""The official `openai` client, unchanged, against a running Baton.

Called by tests/openai_client.rs as `openai_client.py BASE_URL MODEL`; every test method is one promise to a user.
"""

import sys
import unittest

import openai

BASE_URL, MODEL = sys.argv[1], sys.argv[2]
CLIENT = openai.OpenAI(base_url=BASE_URL, api_key="unused", max_retries=0, timeout=120)
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


def chat(**kwargs):
    return CLIENT.chat.completions.create(**{"model": MODEL, "messages": FRANCE, "temperature": 0, "max_tokens": 24, **kwargs})


def chunks(**kwargs):
    return list(chat(stream=True, **kwargs))


def text_of(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


class Chat(unittest.TestCase):
    def test_answers(self):
        answer = chat()
        self.assertEqual(answer.object, "chat.completion")
        self.assertEqual(answer.model, MODEL)
        self.assertTrue(answer.id.startswith("chatcmpl-"))
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertIn("Paris", answer.choices[0].message.content)

    def test_usage_counts_add_up(self):
        usage = chat(max_tokens=5).usage
        self.assertEqual(usage.completion_tokens, 5)
        self.assertGreater(usage.prompt_tokens, 5)
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)

    def test_stream_says_the_same_as_no_stream(self):
        stream = chunks()
        self.assertEqual(text_of(stream), chat().choices[0].message.content)
        self.assertEqual(stream[0].choices[0].delta.role, "assistant")
        reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
        self.assertEqual([reason for reason in reasons if reason], reasons[-1:])
        self.assertTrue(all(chunk.object == "chat.completion.chunk" for chunk in stream))
        self.assertEqual(len({chunk.id for chunk in stream}), 1)

    def test_stream_usage_comes_last_and_only_when_asked(self):
        with_usage = chunks(max_tokens=4, stream_options={"include_usage": True})
        self.assertEqual(with_usage[-1].choices, [])
        self.assertEqual(with_usage[-1].usage.completion_tokens, 4)
        self.assertTrue(all(chunk.usage is None for chunk in with_usage[:-1]))
        self.assertTrue(all(chunk.usage is None for chunk in chunks(max_tokens=4)))

    def test_length_and_stop_finish_reasons(self):
        self.assertEqual(chat(max_tokens=1).choices[0].finish_reason, "length")
        whole = chat(max_tokens=200)
        self.assertEqual(whole.choices[0].finish_reason, "stop")
        self.assertNotIn("<|im_end|>", whole.choices[0].message.content)

    def test_max_completion_tokens(self):
        answer = CLIENT.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_completion_tokens=3)
        self.assertEqual(answer.usage.completion_tokens, 3)

    def test_seed_makes_sampling_repeatable(self):
        sampled = dict(temperature=1.0, top_p=0.95, max_tokens=32)
        texts = [chat(seed=seed, **sampled).choices[0].message.content for seed in (1, 1, 2, 3)]
        self.assertEqual(texts[0], texts[1])
        self.assertGreater(len(set(texts)), 1)

    def test_narrow_sampling_is_greedy(self):
        greedy = chat().choices[0].message.content
        self.assertEqual(chat(temperature=1.5, extra_body={"top_k": 1}).choices[0].message.content, greedy)
        self.assertEqual(chat(temperature=1.0, top_p=1e-6).choices[0].message.content, greedy)
        self.assertEqual(chat(temperature=1.0, extra_body={"min_p": 1.0}).choices[0].message.content, greedy)

    def test_parts_are_one_text(self):
        parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": " of France?"}]
        self.assertIn("Paris", chat(messages=[{"role": "user", "content": parts}]).choices[0].message.content)

    def test_a_system_message_is_taken(self):
        system = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
        self.assertEqual(chat(messages=[system, *FRANCE]).usage.prompt_tokens, chat().usage.prompt_tokens)
        self.assertNotEqual(chat(messages=[{**system, "content": "Talk."}, *FRANCE]).usage.prompt_tokens, chat().usage.prompt_tokens)


class Stop(unittest.TestCase):
    def test_every_cut_of_the_text_stops_there_and_never_leaks(self):
        """Stop strings of every small length and place, most of them across token borders."""
        whole = chat().choices[0].message.content
        for start in range(3, min(len(whole), 24), 4):
            for length in (1, 3, 7):
                stop = whole[start : start + length]
                expected = whole[: whole.find(stop)]
                answer = chat(stop=stop).choices[0]
                self.assertEqual(answer.message.content, expected, stop)
                self.assertEqual(answer.finish_reason, "stop")
        stop = whole[10:18]
        self.assertEqual(text_of(chunks(stop=[stop, "never said"])), whole[: whole.find(stop)])

    def test_a_stop_string_that_never_completes_is_not_swallowed(self):
        whole = chat().choices[0].message.content
        self.assertEqual(text_of(chunks(stop=whole[-1] + "\u2603")), whole)


class Completions(unittest.TestCase):
    def complete(self, **kwargs):
        return CLIENT.completions.create(**{"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 12, **kwargs})

    def test_text(self):
        answer = self.complete()
        self.assertEqual(answer.object, "text_completion")
        self.assertIn("Paris", answer.choices[0].text)
        self.assertEqual(answer.usage.completion_tokens, 12)

    def test_stream(self):
        stream = list(self.complete(stream=True, stream_options={"include_usage": True}))
        self.assertEqual("".join(c.choices[0].text for c in stream if c.choices), self.complete().choices[0].text)
        self.assertEqual(stream[-1].usage.completion_tokens, 12)

    def test_penalties_change_the_text(self):
        asked = dict(prompt="a b a b a b a b a b a b", max_tokens=16)
        plain = self.complete(**asked).choices[0].text
        self.assertEqual(plain, " a b" * 8)
        for penalty in (
            dict(frequency_penalty=2.0),
            dict(presence_penalty=2.0),
            dict(extra_body={"repetition_penalty": 1.8}),
        ):
            self.assertNotEqual(self.complete(**asked, **penalty).choices[0].text, plain, penalty)

    def test_token_prompt(self):
        self.assertTrue(self.complete(prompt=[504, 3575, 282, 4649, 314]).choices[0].text)


class Models(unittest.TestCase):
    def test_list_and_get(self):
        self.assertEqual([model.id for model in CLIENT.models.list()], [MODEL])
        self.assertEqual(CLIENT.models.retrieve(MODEL).id, MODEL)


class Refusals(unittest.TestCase):
    """Each wrong request gets an error of the right class that names the field."""

    def refused(self, error, param, **kwargs):
        with self.assertRaises(error) as caught:
            chat(**kwargs)
        self.assertEqual(caught.exception.param, param, caught.exception)
        self.assertTrue(caught.exception.body["message"])
        return caught.exception

    def test_fields(self):
        bad = openai.BadRequestError
        self.refused(openai.NotFoundError, "model", model="gpt-17")
        self.refused(bad, "messages", messages=[])
        self.refused(bad, "temperature", temperature=-0.1)
        self.refused(bad, "temperature", temperature=2.5)
        self.refused(bad, "top_p", top_p=-0.1)
        self.refused(bad, "top_p", top_p=1.1)
        self.refused(bad, "max_tokens", max_tokens=0)
        self.refused(bad, "frequency_penalty", frequency_penalty=3)
        self.refused(bad, "presence_penalty", presence_penalty=-3)
        self.refused(bad, "min_p", extra_body={"min_p": 2})
        self.refused(bad, "top_k", extra_body={"top_k": -5})
        self.refused(bad, "repetition_penalty", extra_body={"repetition_penalty": 0})
        self.refused(bad, "stop", stop=[""])
        self.refused(bad, "n", n=0)

    def test_prompt_over_the_context(self):
        error = self.refused(openai.BadRequestError, "messages", messages=[{"role": "user", "content": "word " * 20000}])
        self.assertEqual(error.code, "context_length_exceeded")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
