//! What a meter makes of reports of streams that are known.

use super::*;

const BEAT: Duration = Duration::from_secs(1);

fn id(name: &str) -> InstanceId {
    InstanceId::new(name).expect("valid")
}

/// A group that serves a constant stream, a report a second.
struct Stream {
    meter: Meter,
    now: Instant,
    load: InstanceLoad,
    incarnation: Incarnation,
}

impl Stream {
    fn new() -> Self {
        let load = InstanceLoad {
            kv_blocks_total: 1000,
            max_sequences: 64,
            prefill_tokens_per_second: 5000,
            ..InstanceLoad::default()
        };
        Self { meter: Meter::default(), now: Instant::now(), load, incarnation: Incarnation(1) }
    }

    /// `seconds` of `rate` requests, each of `prompt` and `answer` tokens, decoded `batch` at a time in `step` micros.
    fn run(&mut self, seconds: u64, (rate, prompt, answer): (u64, u64, u64), (batch, step): (u64, u64)) {
        for _ in 0..seconds {
            self.now += BEAT;
            self.load.accepted_requests += rate;
            self.load.accepted_prompt_tokens += rate * prompt;
            self.load.accepted_choices += rate;
            self.load.prefilled_requests += rate;
            self.load.prefilled_tokens += rate * prompt;
            self.load.decoded_tokens += rate * answer;
            self.load.finished_requests += rate;
            self.load.finished_tokens += rate * answer;
            self.load.decode_steps += rate * answer / batch;
            self.load.decode_step_micros = step;
            self.meter.report(self.now, &id("a"), self.incarnation, &self.load);
        }
    }

    fn demand(&self) -> Demand {
        self.meter.demand(self.now).expect("enough to go by")
    }
}

fn near(a: f64, b: f64, share: f64) -> bool {
    (a / b - 1.0).abs() < share
}

#[test]
fn a_constant_stream_is_seen_as_it_is() {
    let mut stream = Stream::new();
    assert_eq!(stream.meter.demand(stream.now), None);
    stream.run(1, (0, 0, 0), (1, 0));
    stream.run(60, (4, 1500, 200), (8, 12_000));
    let demand = stream.demand();
    assert!(near(demand.requests_per_second, 4.0, 0.05), "{demand:?}");
    assert!(
        near(demand.prompt_tokens, 1500.0, 1e-9) && near(demand.completion_tokens, 200.0, 1e-9),
        "{demand:?}"
    );
}

#[test]
fn a_shift_is_seen_within_two_minutes_and_silence_fades() {
    let mut stream = Stream::new();
    stream.run(300, (10, 300, 800), (16, 20_000));
    stream.run(100, (2, 6000, 100), (2, 9_000));
    let demand = stream.demand();
    assert!(
        near(demand.requests_per_second, 2.0, 0.1) && near(demand.prompt_tokens, 6000.0, 0.15),
        "{demand:?}"
    );
    stream.run(200, (0, 0, 0), (1, 9_000));
    assert!(stream.meter.demand(stream.now).is_none(), "nothing is asked for any more");
}

#[test]
fn an_instance_that_starts_again_is_not_counted_twice() {
    let mut stream = Stream::new();
    stream.run(60, (4, 1000, 100), (4, 10_000));
    let before = stream.demand().requests_per_second;
    stream.load = InstanceLoad { accepted_requests: 1_000_000, prefilled_requests: 1_000_000, ..stream.load };
    stream.incarnation = Incarnation(2);
    stream.run(1, (4, 1000, 100), (4, 10_000));
    assert!(stream.demand().requests_per_second <= before, "its earlier requests were not of this second");
}

#[test]
fn the_time_of_a_step_is_a_line_over_its_sequences() {
    let mut stream = Stream::new();
    stream.run(1, (0, 0, 0), (1, 0));
    for batch in [4, 8, 16, 32, 16, 8] {
        stream.run(10, (8, 100, 320), (batch, 9_000 + 150 * batch));
    }
    let speed = stream.meter.speed(16).expect("measured");
    assert!(near(speed.step_base, 0.009, 0.05) && near(speed.step_per_sequence, 0.000_15, 0.1), "{speed:?}");
    assert_eq!((speed.prefill_tokens_per_second, speed.kv_tokens), (5000.0, 16_000.0));
}

#[test]
fn steps_that_compute_prompts_too_say_nothing_of_the_time_of_a_step() {
    let mut stream = Stream::new();
    let mut run = |seconds, alone: u64, batch: u64| {
        for _ in 0..seconds {
            let load = &mut stream.load;
            // Those that compute prompts, too, are of 64 sequences.
            load.decode_steps += alone + 20;
            load.decoded_tokens += alone * batch + 20 * 64;
            load.timed_decode_steps += alone;
            load.decode_sequences += alone * batch;
            load.decode_micros += alone * (9_000 + 150 * batch);
            if alone > 0 {
                load.decode_step_micros = 9_000 + 150 * batch;
            }
            stream.now += BEAT;
            stream.meter.report(stream.now, &id("a"), stream.incarnation, load);
        }
        stream.meter.speed(16)
    };
    run(1, 0, 0);
    assert_eq!(run(10, 0, 0), None, "no step has only decoded");
    run(10, 20, 4);
    run(10, 20, 32);
    for alone in [20, 0] {
        let speed = run(10, alone, 8).expect("measured");
        assert!(
            near(speed.step_base, 0.009, 0.05) && near(speed.step_per_sequence, 0.000_15, 0.1),
            "{speed:?}"
        );
    }
}

#[test]
fn who_computes_most_of_the_prompts_says_how_fast_they_are() {
    let mut stream = Stream::new();
    let mut decode = InstanceLoad { prefill_tokens_per_second: 2000, ..stream.load };
    stream.load.prefill_tokens_per_second = 12_000;
    // So many tokens of prompts a second on one, and on the other.
    let mut rate = |seconds, [prefill, decode_too]: [u64; 2]| {
        for _ in 0..seconds {
            stream.run(1, (1, prefill, 100), (4, 10_000));
            decode.prefilled_tokens += decode_too;
            stream.meter.report(stream.now, &id("d"), Incarnation(1), &decode);
        }
        stream.meter.speed(16).expect("measured").prefill_tokens_per_second
    };
    assert_eq!(rate(2, [0, 0]), 7_000.0, "nobody has computed anything");
    assert!(rate(60, [8_000, 400]) > 11_000.0);
    assert!(rate(60, [0, 100]) > 11_000.0, "a minute without long prompts");
    assert!(rate(600, [0, 400]) < 3_000.0, "the first has another role");
}

#[test]
fn batches_of_one_size_leave_a_slope_that_is_neither_none_nor_all() {
    let mut stream = Stream::new();
    stream.run(60, (8, 100, 320), (8, 10_000));
    let speed = stream.meter.speed(16).expect("measured");
    assert!(speed.step_per_sequence > 0.0 && speed.step_base > 0.0, "{speed:?}");
    assert!(near(speed.step_base + 8.0 * speed.step_per_sequence, 0.01, 0.01), "{speed:?}");
}

/// A request every `every` seconds, for `seconds`; each is decoded at 20 tokens a second for `tokens`, all at once.
fn trickle(stream: &mut Stream, seconds: u64, every: u64, tokens: u64) {
    let mut left: Vec<u64> = Vec::new();
    for second in 0..seconds {
        stream.now += BEAT;
        if second % every == 0 {
            stream.load.accepted_requests += 1;
            stream.load.accepted_prompt_tokens += 700;
            stream.load.accepted_choices += 1;
            stream.load.prefilled_requests += 1;
            stream.load.prefilled_tokens += 500;
            left.push(tokens);
        }
        for left in &mut left {
            stream.load.decoded_tokens += 20.min(*left);
            *left -= 20.min(*left);
        }
        let before = left.len();
        left.retain(|left| *left > 0);
        stream.load.finished_requests += (before - left.len()) as u64;
        stream.load.finished_tokens += (before - left.len()) as u64 * tokens;
        stream.load.running_sequences = left.len() as u32;
        stream.load.decode_steps += 20;
        stream.load.decode_step_micros = 50_000;
        stream.meter.report(stream.now, &id("a"), stream.incarnation, &stream.load);
    }
}

#[test]
fn few_long_answers_are_seen_before_the_first_has_ended() {
    let mut stream = Stream::new();
    stream.run(1, (0, 0, 0), (1, 0));
    trickle(&mut stream, 200, 10, 20_000);
    let demand = stream.demand();
    assert!(near(demand.requests_per_second, 0.1, 0.15), "{demand:?}");
    assert!(near(demand.prompt_tokens, 500.0, 1e-9), "{demand:?}");
    // What has been decoded of each so far, doubled, and at most ten times too little.
    assert!((2_000.0..=20_000.0).contains(&demand.completion_tokens), "{demand:?}");
    trickle(&mut stream, 4_000, 10, 20_000);
    let demand = stream.demand();
    assert!(near(demand.requests_per_second, 0.1, 0.15), "{demand:?}");
    assert!(near(demand.completion_tokens, 20_000.0, 0.05), "once enough have ended: {demand:?}");
}

#[test]
fn a_request_a_minute_is_a_demand_and_its_end_is_noticed() {
    let mut stream = Stream::new();
    stream.run(1, (0, 0, 0), (1, 0));
    trickle(&mut stream, 1_200, 60, 600);
    assert!(near(stream.demand().requests_per_second, 1.0 / 60.0, 0.15), "{:?}", stream.demand());
    stream.run(400, (0, 0, 0), (1, 0));
    assert_eq!(stream.meter.demand(stream.now), None);
}

#[test]
fn a_rush_that_is_over_stays_forgotten() {
    let mut stream = Stream::new();
    stream.run(600, (10, 300, 80), (16, 20_000));
    stream.run(60, (0, 0, 0), (1, 0));
    for _ in 0..300 {
        stream.run(10, (0, 0, 0), (1, 0));
        let demand = stream.meter.demand(stream.now);
        assert!(demand.is_none_or(|demand| demand.requests_per_second < 0.4), "{demand:?}");
    }
    trickle(&mut stream, 2_000, 100, 600);
    let demand = stream.demand();
    assert!(near(demand.requests_per_second, 0.01, 0.5), "{demand:?}");
}

#[test]
fn requests_that_wait_are_asked_for_too() {
    let mut stream = Stream::new();
    stream.run(1, (0, 0, 0), (1, 0));
    for _ in 0..40 {
        // One is served in a second, and two come.
        stream.load.accepted_requests += 1;
        stream.load.accepted_prompt_tokens += 1000;
        stream.load.accepted_choices += 3;
        stream.run(1, (1, 1000, 100), (4, 10_000));
    }
    let demand = stream.demand();
    assert!(near(demand.requests_per_second, 2.0, 0.05), "{demand:?}");
    assert!(near(demand.completion_tokens, 200.0, 0.01), "half of them ask for three: {demand:?}");
}
