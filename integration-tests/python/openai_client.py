"""The official `openai` client, unchanged, against a running Baton.

Called by tests/openai_client.rs as `openai_client.py BASE_URL MODEL`; every test method is one promise to a user.
"""

import math
import sys
import unittest

import openai

BASE_URL, MODEL = sys.argv[1], sys.argv[2]
CLIENT = openai.OpenAI(base_url=BASE_URL, api_key="unused", max_retries=0, timeout=120)
# Ids of the model's tokens: "The", and " ☕" in three.
THE, CUP = 504, (4636, 242, 239)
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


class Logprobs(unittest.TestCase):
    def check_entry(self, entry):
        self.assertLessEqual(entry.logprob, 0)
        if entry.bytes is not None and "\\x" not in entry.token:
            self.assertEqual(bytes(entry.bytes).decode(), entry.token)

    def test_of_a_chat(self):
        """Every token with its text, its bytes and the likeliest others; greedy takes the likeliest."""
        answer = chat(logprobs=True, top_logprobs=5).choices[0]
        content = answer.logprobs.content
        self.assertEqual(b"".join(bytes(entry.bytes) for entry in content).decode(), answer.message.content)
        for entry in content:
            self.check_entry(entry)
            self.assertEqual(len(entry.top_logprobs), 5)
            self.assertEqual((entry.top_logprobs[0].token, entry.top_logprobs[0].logprob), (entry.token, entry.logprob))
            self.assertLessEqual(sum(math.exp(top.logprob) for top in entry.top_logprobs), 1.0001)
            given = [top.logprob for top in entry.top_logprobs]
            self.assertEqual(given, sorted(given, reverse=True))
            for top in entry.top_logprobs:
                self.check_entry(top)

    def test_are_the_models_own_whatever_the_sampling(self):
        plain = chat(logprobs=True, max_tokens=1).choices[0].logprobs.content[0]
        hot = chat(logprobs=True, top_logprobs=3, max_tokens=1, temperature=2.0, top_p=1e-6, frequency_penalty=2.0)
        entry = hot.choices[0].logprobs.content[0]
        self.assertEqual((entry.token, entry.logprob), (plain.token, plain.logprob))
        self.assertEqual(entry.top_logprobs[0].logprob, plain.logprob)

    def test_stream_says_the_same_as_no_stream(self):
        whole = chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
        stream = [chunk.choices[0] for chunk in chunks(logprobs=True, top_logprobs=2) if chunk.choices]
        told = [entry for choice in stream if choice.logprobs for entry in choice.logprobs.content]
        self.assertEqual(told, whole)
        for choice in stream:
            if choice.logprobs:
                said = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode()
                self.assertEqual(said, choice.delta.content)

    def test_off_by_default_and_without_alternatives(self):
        self.assertIsNone(chat(max_tokens=2).choices[0].logprobs)
        self.assertIsNone(chat(max_tokens=2, logprobs=False, top_logprobs=0).choices[0].logprobs)
        content = chat(max_tokens=2, logprobs=True, top_logprobs=0).choices[0].logprobs.content
        self.assertEqual([entry.top_logprobs for entry in content], [[], []])

    def test_characters_in_several_tokens_keep_their_bytes(self):
        """A coffee cup is three bytes, which this model's tokens cut."""
        bias = {str(token): 100 for token in CUP}
        answer = chat(logprobs=True, max_tokens=12, temperature=2, seed=3, logit_bias=bias).choices[0]
        told = b"".join(bytes(entry.bytes) for entry in answer.logprobs.content)
        self.assertEqual(told.decode(errors="replace"), answer.message.content)
        self.assertTrue(any("\\x" in entry.token for entry in answer.logprobs.content), answer)

    def test_a_stop_string_ends_the_tokens_too(self):
        whole = chat().choices[0].message.content
        stop = whole[10:14]
        answer = chat(stop=stop, logprobs=True).choices[0]
        told = b"".join(bytes(entry.bytes) for entry in answer.logprobs.content).decode()
        self.assertEqual(answer.message.content, whole[: whole.find(stop)])
        # Of the token in which the stop string begins all is told.
        self.assertTrue(told.startswith(answer.message.content), told)
        self.assertLess(len(told) - len(answer.message.content), 12)
        last = answer.logprobs.content[-1]
        self.assertLess(len(told) - len(last.token), len(answer.message.content))

    def test_of_a_completion(self):
        prompt = dict(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8)
        choice = CLIENT.completions.create(**prompt, logprobs=3).choices[0]
        told = choice.logprobs
        self.assertEqual("".join(told.tokens), choice.text)
        self.assertEqual(told.text_offset, [len("".join(told.tokens[:i])) for i in range(len(told.tokens))])
        self.assertEqual([len(told.token_logprobs), len(told.top_logprobs)], [8, 8])
        for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs):
            self.assertIn(len(top), (3, 4))
            self.assertEqual(top[token], logprob)
            self.assertEqual(max(top.values()), logprob)
        stream = [c.choices[0].logprobs for c in CLIENT.completions.create(**prompt, logprobs=3, stream=True) if c.choices]
        self.assertEqual([t for part in stream if part for t in part.tokens], told.tokens)
        self.assertEqual([o for part in stream if part for o in part.text_offset], told.text_offset)
        self.assertEqual([t for part in stream if part for t in part.top_logprobs], told.top_logprobs)


class Sampling(unittest.TestCase):
    def first(self, **kwargs):
        return chat(logprobs=True, top_logprobs=2, max_tokens=1, **kwargs).choices[0].logprobs.content[0]

    def test_logit_bias_bans_and_forces(self):
        plain = self.first()
        self.assertEqual(plain.token, "The")
        self.assertEqual(self.first(logit_bias={str(THE): -100}).token, plain.top_logprobs[1].token)
        forced = self.first(logit_bias={str(CUP[0]): 100}, temperature=1.0)
        self.assertEqual(bytes(forced.bytes), b" \xe2")
        self.assertLess(forced.logprob, -1, "log probabilities are those before the bias")
        self.assertEqual(forced.top_logprobs, plain.top_logprobs)

    def test_min_tokens_put_the_end_off(self):
        short = chat(max_tokens=200)
        self.assertEqual(short.choices[0].finish_reason, "stop")
        least = short.usage.completion_tokens + 5
        longer = chat(max_tokens=200, extra_body={"min_tokens": least})
        self.assertGreater(longer.usage.completion_tokens, least)
        stop = short.choices[0].message.content[2:4]
        answer = chat(stop=stop, extra_body={"min_tokens": 10})
        self.assertGreater(answer.usage.completion_tokens, 10)

    def test_ignore_eos_ignores_the_models_end_but_not_the_clients(self):
        answer = chat(max_tokens=60, extra_body={"ignore_eos": True})
        self.assertEqual((answer.usage.completion_tokens, answer.choices[0].finish_reason), (60, "length"))
        answer = chat(max_tokens=60, extra_body={"ignore_eos": True, "stop_token_ids": [THE]})
        self.assertEqual((answer.usage.completion_tokens, answer.choices[0].message.content), (1, ""))
        self.assertEqual(answer.choices[0].finish_reason, "stop")

    def test_a_stop_may_be_part_of_the_answer(self):
        whole = chat().choices[0].message.content
        stop = whole[5:9]
        kept = dict(extra_body={"include_stop_str_in_output": True})
        answer = chat(stop=stop, **kept).choices[0].message.content
        self.assertEqual(answer, whole[: whole.find(stop) + len(stop)])
        self.assertEqual(text_of(chunks(stop=stop, **kept)), answer)
        kept["extra_body"]["stop_token_ids"] = [THE]
        self.assertEqual(chat(**kept).choices[0].message.content, "The")

    def test_whole_numbers_may_have_a_point(self):
        self.assertEqual(chat(extra_body={"max_tokens": 3.0}).usage.completion_tokens, 3)


class Choices(unittest.TestCase):
    SAMPLED = dict(temperature=1.0, top_p=0.95, seed=42, max_tokens=20)

    def test_each_is_what_a_request_with_its_seed_gives(self):
        answer = chat(n=3, **self.SAMPLED)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2])
        alone = [chat(**{**self.SAMPLED, "seed": 42 + i}) for i in range(3)]
        self.assertEqual([choice.message.content for choice in answer.choices], [one.choices[0].message.content for one in alone])
        self.assertEqual([choice.finish_reason for choice in answer.choices], [one.choices[0].finish_reason for one in alone])
        self.assertEqual(len({choice.message.content for choice in answer.choices}), 3)
        self.assertEqual(answer.usage.prompt_tokens, alone[0].usage.prompt_tokens)
        self.assertEqual(answer.usage.completion_tokens, sum(one.usage.completion_tokens for one in alone))

    def test_stream_says_the_same_as_no_stream(self):
        asked = dict(n=3, logprobs=True, stop=[",", " and"], stream_options={"include_usage": True}, **self.SAMPLED)
        stream = chunks(**asked)
        asked.pop("stream_options")
        whole = chat(**asked)
        for choice in whole.choices:
            own = [c.choices[0] for c in stream if c.choices and c.choices[0].index == choice.index]
            self.assertEqual("".join(c.delta.content or "" for c in own), choice.message.content)
            self.assertEqual([c.finish_reason for c in own if c.finish_reason], [choice.finish_reason])
            told = [entry for c in own if c.logprobs for entry in c.logprobs.content]
            self.assertEqual(told, choice.logprobs.content)
        self.assertEqual(stream[-1].usage, whole.usage)

    def test_greedy_choices_are_alike(self):
        self.assertEqual(len({choice.message.content for choice in chat(n=2).choices}), 1)

    def test_prompts_and_choices_of_completions(self):
        prompts = ["The capital of France is", "One, two, three,"]
        asked = dict(model=MODEL, temperature=0.9, seed=5, max_tokens=8, n=2, extra_body={"best_of": 2})
        answer = CLIENT.completions.create(prompt=prompts, **asked)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2, 3])
        alone = [CLIENT.completions.create(prompt=prompt, **asked) for prompt in prompts]
        self.assertEqual([c.text for c in answer.choices], [c.text for one in alone for c in one.choices])
        self.assertEqual(answer.usage.completion_tokens, sum(one.usage.completion_tokens for one in alone))
        texts = [""] * 4
        for chunk in CLIENT.completions.create(prompt=prompts, stream=True, **asked):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        self.assertEqual(texts, [c.text for c in answer.choices])


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

    def test_echo(self):
        told = self.complete().choices[0].text
        self.assertEqual(self.complete(echo=True).choices[0].text, "The capital of France is" + told)
        stream = self.complete(prompt=[504, 3575, 282, 4649, 314], echo=True, stream=True)
        self.assertEqual("".join(c.choices[0].text for c in stream), "The capital of France is" + told)
        with self.assertRaises(openai.BadRequestError) as caught:
            self.complete(echo=True, logprobs=1)
        self.assertEqual(caught.exception.param, "echo")

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
        self.refused(bad, "n", n=33)
        self.refused(bad, "top_logprobs", logprobs=True, top_logprobs=21)
        self.refused(bad, "top_logprobs", top_logprobs=1)
        self.refused(bad, "logit_bias", logit_bias={"504": 101})
        self.refused(bad, "logit_bias", logit_bias={"The": 1})
        self.refused(bad, "min_tokens", extra_body={"min_tokens": 25})
        self.refused(bad, "stop_token_ids", extra_body={"stop_token_ids": [49152]})
        self.refused(bad, "priority", extra_body={"priority": 1 << 40})
        self.refused(bad, "best_of", extra_body={"best_of": 2})
        self.refused(bad, "use_beam_search", extra_body={"use_beam_search": True})
        self.refused(bad, "echo", extra_body={"echo": True})

    def test_prompt_over_the_context(self):
        error = self.refused(openai.BadRequestError, "messages", messages=[{"role": "user", "content": "word " * 20000}])
        self.assertEqual(error.code, "context_length_exceeded")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
