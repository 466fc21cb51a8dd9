//! The simulation that judges placement (`benches/placement`) is itself judged: by hand, by counting, and by its seed.

#[allow(dead_code, reason = "the bench uses the rest")]
#[path = "../benches/placement/replay/mod.rs"]
mod replay;

use baton_schedule::Settings;
use replay::{
    cache::{Cache, Changes},
    chooser::{Choice, Chooser, Place, Report, Sight},
    coordinators::Coordinators,
    figures::Figures,
    machine::{Draws, Machine, Target},
    peers::{Peer, Rule},
    simulation::{Outcome, Setup, run},
    synthetic,
    trace::{Request, Trace, TraceError},
};

const RULES: [Rule; 7] = [
    Rule::RoundRobin,
    Rule::LeastRequests,
    Rule::LeastLoad,
    Rule::CacheAware,
    Rule::Dynamo(0.0),
    Rule::Dynamo(1.0),
    Rule::Smetric,
];

fn setup(seed: u64) -> Setup {
    Setup {
        settings: Settings::default(),
        coordinators: 1,
        report_micros: 500_000,
        prefills: 8,
        decodes: 8,
        cache_blocks: 1_000,
        speed: 1.2,
        spread_micros: 10_000,
        seed,
        machine: Machine::NODE,
    }
}

fn choosers(setup: &Setup) -> Vec<Box<dyn Chooser>> {
    let (prefills, decodes) = (setup.prefills, setup.decodes);
    let peer = |rule: &Rule| Box::new(Peer::new(*rule, setup.machine, prefills, decodes)) as Box<dyn Chooser>;
    let mut choosers: Vec<_> = RULES.iter().map(peer).collect();
    for (many, local_prefill_tokens) in [(1, 0), (3, 0), (1, 2_048), (3, 2_048)] {
        let settings = Settings { local_prefill_tokens, ..setup.settings };
        choosers.push(Box::new(Coordinators::new(many, prefills, decodes, settings)));
    }
    choosers
}

/// Two prefill instances and one of decode, without noise, of round figures.
fn by_hand() -> (Trace, Setup) {
    let machine = Machine {
        prefill_step_micros: 1_000.0,
        prefill_token_micros: 100.0,
        attention_micros: 0.0,
        decode_step_micros: 20_000.0,
        decode_context_micros: 0.0,
        decode_sequence_micros: 0.0,
        transfer_token_micros: 1.0,
        noise: 0.0,
        ..Machine::NODE
    };
    let trace = Trace::new(vec![
        Request::new(0, 512, 3, vec![7]),
        Request::new(0, 1_024, 1, vec![8, 9]),
        Request::new(10_000, 512, 1, vec![7]),
    ]);
    let setup = Setup { prefills: 2, decodes: 1, speed: 1.0, spread_micros: 0, machine, ..setup(0) };
    (trace, setup)
}

fn round_robin(trace: &Trace, setup: &Setup) -> Outcome {
    run(trace, setup, &mut Peer::new(Rule::RoundRobin, setup.machine, setup.prefills, setup.decodes))
}

#[test]
fn round_robin_gives_what_a_hand_computes() {
    let (trace, setup) = by_hand();
    let outcome = round_robin(&trace, &setup);
    let seen = |index: usize| {
        let answer = outcome.answers[index];
        (answer.prefill, answer.found_tokens, answer.first_micros, answer.last_micros)
    };
    // One step of 512 tokens: 1,000 + 51,200. Its cache, sent meanwhile, is decoded from 2,000 later, in two steps.
    assert_eq!(seen(0), (Some(0), 0, 52_200, 52_200 + 2_000 + 2 * 20_000));
    // Two steps, and no more than a token.
    assert_eq!(seen(1), (Some(1), 0, 104_400, 104_400));
    // Behind the first, whose prompt it has: only its last token is computed.
    assert_eq!(seen(2), (Some(0), 511, 53_300, 53_300));
    assert_eq!(outcome.prefill_busy_micros, [53_300, 104_400]);
    let figures = Figures::of(&trace, &setup.machine, &outcome);
    assert_eq!(figures.ttft_mean_seconds, (52_200.0 + 104_400.0 + 43_300.0) / 3.0 / 1e6);
    assert_eq!(figures.tpot_mean_millis, 21.0);
    assert_eq!(figures.goodput, 1.0);
    assert_eq!(figures.hit, 511.0 / 2_048.0);
    assert_eq!(figures.imbalance, 104_400.0 / ((53_300.0 + 104_400.0) / 2.0));
}

#[test]
fn prompts_that_wait_together_share_a_step_and_a_slow_link_delays_decode() {
    let (_, mut setup) = by_hand();
    setup.prefills = 1;
    setup.machine.transfer_token_micros = 200.0;
    let short = |block: u64, output: u32| Request::new(0, 100, output, vec![block]);
    let outcome = round_robin(&Trace::new(vec![short(1, 1), short(2, 2), short(3, 1)]), &setup);
    let seen: Vec<_> =
        outcome.answers.iter().map(|answer| (answer.first_micros, answer.last_micros)).collect();
    // The first is computed alone as nobody else is there, the others then in one step. The second's cache is under way
    // from the step's beginning for 20,000, while the step lasts 21,000.
    assert_eq!(seen, [(11_000, 11_000), (32_000, 32_000 + 2_000 + 20_000), (32_000, 32_000)]);
    setup.machine.transfer_token_micros = 300.0;
    let outcome = round_robin(&Trace::new(vec![short(1, 1), short(2, 2), short(3, 1)]), &setup);
    assert_eq!(outcome.answers[1].last_micros, 11_000 + 30_000 + 2_000 + 20_000);
}

/// Sends each request where it was told to.
struct Told(Vec<Choice>);

impl Chooser for Told {
    fn choose(&mut self, sight: &Sight<'_>) -> Option<Choice> {
        Some(self.0[sight.index])
    }

    fn bind(&mut self, _: u64) -> Option<(usize, Choice)> {
        None
    }

    fn prefilled(&mut self, _: usize, _: u64) {}
    fn handed_off(&mut self, _: usize, _: u64) {}
    fn finished(&mut self, _: usize, _: u32, _: u64) {}
    fn heard(&mut self, _: Place, _: &Report, _: u64) {}
    fn cached(&mut self, _: Place, _: &Changes, _: u64) {}
}

#[test]
fn a_batch_stands_still_while_its_instance_computes_a_prompt() {
    let (_, setup) = by_hand();
    let trace = Trace::new(vec![
        Request::new(0, 512, 4, vec![7]),
        Request::new(60_000, 512, 2, vec![9]),
        Request::new(300_000, 1_024, 1, vec![9, 10]),
        Request::new(400_000, 512, 1, vec![7]),
    ]);
    let choice = |prefill| Choice { prefill, decode: 0, in_time: true };
    let told = [Some(0), None, None, None].map(choice).to_vec();
    let outcome = run(&trace, &setup, &mut Told(told));
    let seen: Vec<_> = outcome
        .answers
        .iter()
        .map(|answer| (answer.found_tokens, answer.first_micros, answer.last_micros))
        .collect();
    // The first has had one step by 74,200. The next takes 511 tokens of the other's prompt along, for 72,100, and the one
    // after that the last token, for 21,100.
    assert_eq!(seen[0], (0, 52_200, 74_200 + 72_100 + 21_100));
    assert_eq!(seen[1], (0, 167_400, 167_400 + 20_000));
    // It keeps what it has computed, and what was handed over.
    assert_eq!(seen[2], (512, 352_200, 352_200));
    assert_eq!(seen[3], (511, 401_100, 401_100));
    assert_eq!(outcome.prefill_busy_micros, [52_200, 0]);
    assert_eq!(Figures::of(&trace, &setup.machine, &outcome).local, 0.75);
}

#[test]
fn every_request_is_answered_once_whoever_places_it() {
    let trace = synthetic::trace(300, 5);
    // In the order of the trace, so that nobody finds what comes later in it.
    let setup = Setup { spread_micros: 0, ..setup(1) };
    for mut chooser in choosers(&setup) {
        let outcome = run(&trace, &setup, &mut *chooser);
        assert_eq!(outcome.answers.len(), trace.requests.len());
        let computed: u64 = outcome.prefill_busy_micros.iter().sum();
        let mut least = 0.0;
        for (answer, request) in outcome.answers.iter().zip(&trace.requests) {
            assert_eq!(answer.ends, 1);
            assert!(answer.arrived_micros < answer.first_micros && answer.first_micros <= answer.last_micros);
            assert_eq!(answer.first_micros == answer.last_micros, request.output_tokens == 1);
            assert!(answer.found_tokens <= request.seen_tokens, "{answer:?} of {}", request.seen_tokens);
            if answer.prefill.is_some() {
                let uncached = request.prompt_tokens - answer.found_tokens;
                least += setup.machine.prefill_micros(answer.found_tokens, uncached);
            }
        }
        // Noise evens out, and one instance in eight is half as slow again.
        assert!((0.98..1.25).contains(&(computed as f64 / least)), "{computed} of {least}");
    }
}

#[test]
fn a_replay_is_the_same_for_the_same_seed_and_another_for_another() {
    let trace = synthetic::trace(200, 2);
    assert_eq!(trace, synthetic::trace(200, 2));
    for index in 0..choosers(&setup(3)).len() {
        let replay = |seed: u64| run(&trace, &setup(seed), &mut *choosers(&setup(seed))[index]);
        assert_eq!(replay(3), replay(3), "chooser {index}");
        assert_ne!(replay(3), replay(4), "chooser {index}");
    }
}

#[test]
fn requests_go_where_their_prompt_is_cached_by_the_rules_that_look() {
    let (_, setup) = by_hand();
    let chain: Vec<u64> = (0..8).collect();
    let ask = |at: u64, blocks: usize| Request::new(at, 512 * blocks as u32, 1, chain[..blocks].to_vec());
    // Turns of one conversation, each long after the last.
    let trace = Trace::new(vec![ask(0, 4), ask(60_000_000, 6), ask(120_000_000, 8)]);
    for (rule, follows) in RULES.into_iter().zip([false, false, false, true, true, true, true]) {
        let outcome = run(&trace, &setup, &mut Peer::new(rule, setup.machine, 2, 1));
        let found: Vec<u32> = outcome.answers.iter().map(|answer| answer.found_tokens).collect();
        assert_eq!(found == [0, 4 * 512, 6 * 512], follows, "{rule:?}: {found:?}");
    }
}

#[test]
fn cache_aware_goes_by_any_overlap_and_among_equals_by_fewest_requests() {
    let (_, setup) = by_hand();
    // After so many seconds, what is asked for, and who is to have it.
    let asked: [(u64, &[u64], usize); 8] = [
        // While nobody has anything whoever has less to do.
        (0, &[0, 20], 0),
        (0, &[0, 21], 1),
        // One has two blocks of eight, the other one: it is given both.
        (60, &[0, 20, 30, 31, 32, 33, 34, 35], 0),
        (60, &[0, 20, 40, 41, 42, 43, 44, 45], 0),
        (120, &[0, 20, 50], 0),
        (120, &[0, 20, 51], 0),
        (120, &[0, 20, 52], 0),
        // Both have one of two.
        (120, &[0, 60], 1),
    ];
    let request = |(at, (seconds, chain, _)): (usize, &(u64, &[u64], usize))| {
        Request::new(seconds * 1_000_000 + at as u64, 512 * chain.len() as u32, 1, chain.to_vec())
    };
    let trace = Trace::new(asked.iter().enumerate().map(request).collect());
    let outcome = run(&trace, &setup, &mut Peer::new(Rule::CacheAware, setup.machine, 2, 1));
    let given: Vec<_> = outcome.answers.iter().map(|answer| answer.prefill).collect();
    assert_eq!(given, asked.map(|(.., prefill)| Some(prefill)));
}

#[test]
fn a_cache_gives_up_what_is_oldest_from_the_ends_of_chains() {
    let mut cache = Cache::new(4);
    cache.hold(&[1, 2, 3]);
    cache.hold(&[1, 4]);
    assert_eq!((cache.held(&[1, 2, 3]), cache.held(&[1, 4, 5])), (3, 2));
    cache.hold(&[1, 6]);
    assert_eq!((cache.held(&[1, 2, 3]), cache.held(&[1, 4]), cache.held(&[1, 6])), (2, 2, 2));
    for round in 0..1_000 {
        cache.hold(&[1, round + 10]);
    }
    assert_eq!((cache.held(&[1, 1_009]), cache.held(&[2])), (2, 0));
}

#[test]
fn a_trace_is_read_or_refused_by_the_name_of_what_is_wrong() {
    let line = r#"{"timestamp": 3000, "input_length": 600, "output_length": 0, "hash_ids": [0, 5]}"#;
    let earlier = r#"{"timestamp": 1, "input_length": 512, "output_length": 9, "hash_ids": [0]}"#;
    let trace = Trace::parse(&format!("{line}\n\n{earlier}\n")).expect("a good trace");
    let seen: Vec<_> = trace.requests.iter().map(|r| (r.at_micros, r.output_tokens, r.seen_tokens)).collect();
    assert_eq!(seen, [(1_000, 9, 0), (3_000_000, 1, 512)]);
    let twice = trace.times(2);
    assert_eq!(twice.requests.len(), 4);
    assert_eq!(twice.seen_share(), trace.seen_share());
    let said = |text: &str| Trace::parse(text).map_err(|error: TraceError| error.to_string()).unwrap_err();
    assert!(said("").contains("no requests"));
    assert!(said("{}").contains("line 1 of the trace: missing field `timestamp`"));
    assert!(said(&line.replace("[0, 5]", "[0]")).contains("`hash_ids` has 1 blocks"));
    assert!(said(&line.replace("600", "0")).contains("`input_length`"));
    assert!(said(&line.replace(": 0,", ": 200000,")).contains("`output_length`"));
}

#[test]
fn synthetic_traffic_has_the_proportions_of_what_it_stands_for() {
    let trace = synthetic::trace(3_000, 1);
    let mean = |of: fn(&Request) -> u32| {
        trace.requests.iter().map(|request| f64::from(of(request))).sum::<f64>() / 3_000.0
    };
    let (prompt, output) = (mean(|request| request.prompt_tokens), mean(|request| request.output_tokens));
    assert!((10_000.0..14_500.0).contains(&prompt), "{prompt}");
    assert!((300.0..380.0).contains(&output), "{output}");
    assert!((0.28..0.45).contains(&trace.seen_share()), "{}", trace.seen_share());
    let seconds = trace.requests[2_999].at_micros as f64 / 1e6;
    assert!((3.0..3.8).contains(&(3_000.0 / seconds)), "{seconds}");
}

#[test]
fn noise_has_the_deviation_that_it_says_and_the_target_grows_with_the_prompt() {
    let mut draws = Draws::new(1);
    let times: Vec<f64> = (0..20_000).map(|_| Machine::NODE.noisy(1_000.0, &mut draws) as f64).collect();
    let mean = times.iter().sum::<f64>() / 20_000.0;
    let deviation = (times.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / 20_000.0).sqrt();
    assert!((mean - 1_000.0).abs() < 5.0 && (deviation - 100.0).abs() < 5.0, "{mean} {deviation}");
    assert_eq!(Target::ttft_micros(&Request::new(0, 8_192, 1, Vec::new())), 2.5e6);
    let slow = |seed: u64| (0..8).filter(|index| Machine::NODE.slowness(*index, 8, seed) > 1.0).count();
    assert!((0..16).all(|seed| slow(seed) == 1));
}
