//! What the formulas of [`crate::cost`] come to, seen through who is chosen.

mod local;

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use baton_proto::{Incarnation, InstanceId};
use tokio::time::{Instant, advance};

use crate::{
    Among, NoPlace, Placement, Receipt, Settings, Side, Targets, Wanted,
    board::Board,
    fleet::{
        Load, Role, Spec, Timed,
        testing::{ready, spec},
    },
};

/// Half a millisecond a token, 20 ms a step and 1 ms for each sequence in it, seen often enough to be believed.
fn timed(reports: u64) -> Timed {
    let steps = 10 * reports;
    Timed {
        prefill_micros: 512 * 500 * reports,
        prefill_steps: reports,
        prefill_tokens: 512 * reports,
        prefill_pairs: 0,
        decode_micros: 24_000 * steps,
        decode_steps: steps,
        decode_sequences: 4 * steps,
        context_tokens: 0,
    }
}

/// These instances, which have served for long and report so.
fn board(settings: Settings, instances: &[(&str, Role, Load)]) -> Arc<Board> {
    let board = Board::new(Duration::from_secs(60), settings);
    let specs: Vec<Spec> = instances.iter().map(|(id, ..)| spec_of(id)).collect();
    let mut sorted = specs.clone();
    sorted.sort_by(|a, b| a.id.cmp(&b.id));
    board.list(&sorted, Instant::now());
    for (spec, (_, role, load)) in specs.iter().zip(instances) {
        board.up(&spec.id, spec.incarnation, ready(*role));
        for reports in 0..60 {
            board.load(&spec.id, Load { timed: timed(reports), ..*load });
        }
    }
    board
}

/// A context as long as any, and 1 KB of cache a token.
fn spec_of(id: &str) -> Spec {
    Spec { context_tokens: 0, token_bytes: 1_000, ..spec(id) }
}

fn placed(board: &Arc<Board>, prompt_tokens: u32) -> Result<(Placement, Receipt), NoPlace> {
    let booking = board.book(&Wanted::new(prompt_tokens, 64, "r1"))?;
    Ok((booking.placement, booking.receipt))
}

/// One that is new.
fn roomy(prompt_tokens: u32, max_tokens: u32) -> Wanted<'static> {
    Wanted { among: Among::Roomy, ..Wanted::new(prompt_tokens, max_tokens, "r1") }
}

/// The instances that were chosen.
fn chosen(board: &Arc<Board>, prompt_tokens: u32) -> Vec<String> {
    instances(&placed(board, prompt_tokens).expect("a place").0)
}

fn instances(placement: &Placement) -> Vec<String> {
    match placement {
        Placement::Alone(assignee) => vec![assignee.instance.to_string()],
        Placement::Apart { prefill, decode } => {
            vec![prefill.instance.to_string(), decode.instance.to_string()]
        }
    }
}

const AMPLE: Targets = Targets {
    ttft: Duration::from_secs(3600),
    ttft_per_1k_tokens: Duration::ZERO,
    tpot: Duration::from_secs(1),
};
const PLAIN: Settings = Settings { warm_up: Duration::ZERO, targets: AMPLE, ..Settings::APART };

fn queued(tokens: u64) -> Load {
    Load { queued_prefill_tokens: tokens, kv_blocks_total: 10_000, kv_blocks_free: 9_000, ..Load::default() }
}

fn running(sequences: u32) -> Load {
    Load { sequences, running: sequences, kv_blocks_total: 10_000, kv_blocks_free: 9_000, ..Load::default() }
}

#[tokio::test(start_paused = true)]
async fn what_is_predicted_is_on_the_receipt() {
    let fleet = [("p", Role::Prefill, queued(1_000)), ("d", Role::Decode, running(3))];
    let (_, receipt) = placed(&board(PLAIN, &fleet), 200).expect("a place");
    let of = |side| receipt.cheapest.iter().find(|scored| scored.side == side).expect("a candidate");
    let near = |micros: u64, expected: f64| assert!((micros as f64 / expected - 1.0).abs() < 0.1, "{micros}");
    // 1,200 tokens; a step of four sequences.
    near(of(Side::Prefill).ttft_micros, 600_000.0);
    near(of(Side::Decode).tpot_micros, 24_000.0);
    assert_eq!((of(Side::Prefill).tpot_micros, of(Side::Decode).ttft_micros), (0, 0));
}

/// Steps of an instance that takes 20 ms, 0.1 ms for each sequence and 0.08 µs for each token of these, which many share.
#[tokio::test(start_paused = true)]
async fn a_step_is_of_all_that_is_attended_to_however_few_blocks_it_is_in() {
    let fleet = [("p", Role::Prefill, queued(0)), ("d", Role::Decode, running(0))];
    let board = board(PLAIN, &fleet);
    let (d, mut timed) = (spec_of("d").id, timed(60));
    let mut report = |sequences: u32, tokens: u64| {
        let all = u64::from(sequences) * tokens;
        timed.decode_steps += 1;
        timed.decode_micros += 20_000 + 100 * u64::from(sequences) + 80 * all / 1_000;
        (timed.decode_sequences, timed.context_tokens) =
            (timed.decode_sequences + u64::from(sequences), timed.context_tokens + all);
        board.load(&d, Load { timed, sequences, ..running(0) });
    };
    (0..600u32).for_each(|at| report(1 + at * 7 % 60, 100 + u64::from(at) * 97 % 30_000));
    report(60, 30_000);
    let (_, receipt) = placed(&board, 30_000).expect("a place");
    let tpot = receipt.cheapest.iter().map(|scored| scored.tpot_micros).max().unwrap_or(0);
    let truth = 20_000 + 100 * 61 + 80 * 61 * 30;
    assert!(tpot.abs_diff(truth) < truth / 10, "{tpot}, and it takes {truth}");
    // What is left of an answer is of such steps, too.
    let left = board.left(&d, 1, 11).as_micros() as u64;
    assert!(left.abs_diff(10 * truth) < truth, "{left}");
    // Each choice attends to the prompt.
    report(1, 100);
    let booked = board.book(&Wanted { choices: 60, ..Wanted::new(30_000, 64, "r1") }).expect("a place");
    let tpot = booked.receipt.cheapest.iter().map(|scored| scored.tpot_micros).max().unwrap_or(0);
    assert!(tpot.abs_diff(truth) < truth / 10, "{tpot}, and it takes {truth}");
}

#[tokio::test(start_paused = true)]
async fn a_prompt_on_a_mixed_instance_is_paid_for_by_those_that_it_holds_up() {
    let mixed = |batch| {
        [
            ("m", Role::Mixed, running(batch)),
            ("d", Role::Decode, running(4)),
            ("p", Role::Prefill, queued(1_000)),
        ]
    };
    // 2,000 tokens take 1,000 ms, and 1,500 where 1,000 are queued already: worth it if ten stand still for as long.
    assert_eq!(chosen(&board(PLAIN, &mixed(0)), 2_000), ["m"]);
    assert_eq!(chosen(&board(PLAIN, &mixed(10)), 2_000), ["p", "d"]);
    // Those that wait there are prompts, which stand still for nothing.
    let cost = |run| {
        let (_, receipt) =
            placed(&board(PLAIN, &[("m", Role::Mixed, Load { running: run, ..running(10) })]), 1_000)
                .expect("a place");
        receipt.cost_micros
    };
    assert!(cost(10) > cost(0) + 10 * 500_000);
    // 512 tokens for 256 ms in each of two chunks, and a step of four sequences beside each.
    let (_, receipt) = placed(&board(PLAIN, &[("m", Role::Mixed, running(3))]), 1_000).expect("a place");
    let ttft = receipt.cheapest[0].ttft_micros;
    assert!((545_000..551_000).contains(&ttft), "{ttft}");
}

#[tokio::test(start_paused = true)]
async fn a_new_instance_gets_its_share_by_and_by() {
    let settings = Settings { warm_up: Duration::from_secs(60), ..PLAIN };
    let fleet =
        [("p", Role::Prefill, queued(0)), ("d0", Role::Decode, running(8)), ("d1", Role::Decode, running(8))];
    let board = board(settings, &fleet);
    advance(Duration::from_secs(600)).await;
    let d1 = spec_of("d1");
    let load = |sequences| board.load(&d1.id, Load { timed: timed(60), ..running(sequences) });
    // Its stream breaks, and it drains for a moment, and is what it was.
    board.down(&d1.id, Instant::now());
    board.up(&d1.id, d1.incarnation, ready(Role::Decode));
    board.duty(&d1.id, crate::fleet::Duty { ready: false, ..ready(Role::Decode) });
    board.duty(&d1.id, ready(Role::Decode));
    load(4);
    assert_eq!(chosen(&board, 10)[1], "d1", "it is not new");
    // It is started again.
    let specs = ["d0", "d1", "p"]
        .map(|id| Spec { incarnation: Incarnation(if id == "d1" { 2 } else { 1 }), ..spec_of(id) });
    board.down(&d1.id, Instant::now());
    board.list(&specs, Instant::now());
    board.up(&d1.id, Incarnation(2), ready(Role::Decode));
    load(4);
    assert_eq!(chosen(&board, 10)[1], "d0", "a tenth of it is its share at first");
    let (_, receipt) = placed(&board, 10).expect("a place");
    let own = receipt.cheapest.iter().find(|scored| scored.instance == d1.id).expect("a candidate");
    assert!((24_500..25_500).contains(&own.tpot_micros), "of five, as it is: {}", own.tpot_micros);
    load(0);
    assert_eq!(chosen(&board, 10)[1], "d1", "which is more than nothing");
    load(4);
    advance(Duration::from_secs(45)).await;
    load(4);
    assert_eq!(chosen(&board, 10)[1], "d1");
}

#[tokio::test(start_paused = true)]
async fn nobody_is_new_where_all_have_just_been_heard_of() {
    let settings = Settings { warm_up: Duration::from_secs(60), ..PLAIN };
    let busy = Load { kv_blocks_total: 4, kv_blocks_free: 1, ..running(8) };
    let board = board(settings, &[("p", Role::Prefill, queued(0)), ("d", Role::Decode, busy)]);
    let cost = || placed(&board, 40).expect("a place").1.cost_micros as f64;
    let alike = |cost: f64, other: f64| (cost / other - 1.0).abs() < 0.01;
    let first = cost();
    advance(Duration::from_secs(600)).await;
    let later = cost();
    assert!(alike(first, later), "{first}, then {later}");
    let d = spec_of("d");
    board.duty(&d.id, ready(Role::Mixed));
    board.duty(&d.id, ready(Role::Decode));
    let again = cost();
    assert!(alike(again, later), "it has no older peer: {again}, for {later}");
}

#[tokio::test(start_paused = true)]
async fn what_misses_its_target_costs_more() {
    let fleet =
        [("p", Role::Prefill, queued(0)), ("d0", Role::Decode, running(8)), ("d1", Role::Decode, running(9))];
    let cost = |tpot| {
        let settings = Settings { targets: Targets { tpot: Duration::from_millis(tpot), ..AMPLE }, ..PLAIN };
        let (_, receipt) = placed(&board(settings, &fleet), 10).expect("a place");
        let of = |id: &str| {
            receipt.cheapest.iter().find(|scored| scored.instance.as_str() == id).map(|s| s.cost_micros)
        };
        of("d1").unwrap_or(0) as f64 / of("d0").unwrap_or(0) as f64
    };
    // A step of nine sequences takes 29 ms, of ten 30.
    assert!(cost(29) > 1.05 * cost(1_000), "{} {}", cost(29), cost(1_000));
}

#[tokio::test(start_paused = true)]
async fn what_is_left_until_the_first_token_is_wanted_is_what_it_may_take() {
    let targets = Targets { ttft: Duration::from_secs(10), ..AMPLE };
    let fleet = [("p", Role::Prefill, queued(3_800)), ("d", Role::Decode, running(0))];
    let board = board(Settings { targets, ..PLAIN }, &fleet);
    let cost = |left: Option<u64>| {
        let first_token = left.map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let wanted = Wanted { first_token, ..Wanted::new(200, 64, "r1") };
        board.look(&wanted).expect("a place").1.cost_micros as f64 / 1e6
    };
    let new = cost(None);
    // It takes 2 s, each of which counts four times more if it is late.
    for (left, late) in [(10, 0.0), (2, 0.0), (1, 1.0), (0, 2.0)] {
        let more = cost(Some(left)) - new;
        assert!((more - 4.0 * late).abs() < 0.5, "{left} s are left, and it costs {more} s more");
    }
    advance(Duration::from_secs(60)).await;
    let overdue =
        Wanted { first_token: Some(Instant::now() - Duration::from_secs(50)), ..Wanted::new(200, 64, "r1") };
    let more = board.look(&overdue).expect("a place").1.cost_micros as f64 / 1e6 - new;
    assert!((more - 8.0).abs() < 0.5, "what it is late already is the same everywhere: {more}");
}

#[tokio::test(start_paused = true)]
async fn a_pair_whose_handoffs_fail_is_passed_by() {
    let fleet =
        [("p0", Role::Prefill, queued(0)), ("p1", Role::Prefill, queued(0)), ("d", Role::Decode, running(0))];
    let board = board(PLAIN, &fleet);
    let other = |first: &str| if first == "p0" { "p1" } else { "p0" };
    let booking = board.book(&Wanted::new(10, 64, "r1")).expect("a place");
    let first = booking.credit.instance(Side::Prefill).to_string();
    booking.credit.handoff_took(None);
    drop(booking);
    assert!((0..4).all(|_| chosen(&board, 10)[0] == other(&first)));
    let avoid = [InstanceId::new(other(&first)).expect("a good id")];
    let left = board.book(&Wanted { avoid: &avoid, ..Wanted::new(10, 64, "r1") }).expect("a place");
    assert_eq!(left.credit.instance(Side::Prefill).as_str(), first, "it is taken where nobody else is");
}

#[tokio::test(start_paused = true)]
async fn how_long_decode_lets_a_cache_wait_is_not_taken_for_the_way() {
    let most = |most| Load { sequences_most: NonZeroU32::new(most), ..running(8) };
    let full = Load { kv_blocks_total: 100, kv_blocks_free: 0, ..running(8) };
    for (decode, learnt) in [(most(64), true), (most(8), false), (full, false)] {
        let board = board(PLAIN, &[("p", Role::Prefill, queued(0)), ("d", Role::Decode, decode)]);
        let booking = board.book(&Wanted::new(10, 64, "r1")).expect("a place");
        let handoff = || placed(&board, 10).expect("a place").1.handoff_micros;
        let before = handoff();
        booking.credit.handoff_took(Some(Duration::from_millis(900)));
        assert_eq!(handoff() != before, learnt, "{decode:?}");
        booking.credit.handoff_took(None);
        assert!(handoff() > before, "that it fails is learnt of each");
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_request_waits_while_nobody_has_room_and_then_goes_to_the_best() {
    let settings = Settings { room: Duration::from_secs(1), ..PLAIN };
    let within = |instances: &[(&str, Role, Load)], max_tokens| {
        let board = board(settings, instances);
        let booked = board.book(&roomy(200, max_tokens));
        // Others that look for another place do not wait.
        assert!(matches!(booked, Ok(_) | Err(NoPlace::Busy | NoPlace::NoDecode)));
        assert!(booked.is_ok() || max_tokens == 1 || instances.len() < 2 || placed(&board, 200).is_ok());
        booked.map(drop)
    };
    let (busy, idle) = (queued(3_000), queued(1_000));
    let decode = ("d", Role::Decode, running(8));
    let pair = |p0, p1| [("p0", Role::Prefill, p0), ("p1", Role::Prefill, p1), decode];
    assert_eq!(within(&pair(busy, busy), 64), Err(NoPlace::Busy));
    assert_eq!(within(&pair(busy, idle), 64), Ok(()));
    // Of one token prefill serves all.
    assert_eq!(within(&[("p0", Role::Prefill, busy)], 1), Err(NoPlace::Busy));
    assert_eq!(within(&[("p0", Role::Prefill, idle)], 1), Ok(()));
    assert_eq!(within(&[("m", Role::Mixed, busy)], 64), Err(NoPlace::Busy));
    assert_eq!(within(&[("m", Role::Mixed, busy), ("n", Role::Mixed, idle)], 64), Ok(()));
    // To wait for room is of no use where something else is missing.
    assert_eq!(within(&[("p0", Role::Prefill, busy)], 64), Err(NoPlace::NoDecode));
}

#[tokio::test(start_paused = true)]
async fn a_new_request_waits_while_decode_has_no_blocks_for_long() {
    let full = |sequences| Load { kv_blocks_total: 100, kv_blocks_free: 0, ..running(sequences) };
    let settings = Settings { room: Duration::from_secs(2), ..PLAIN };
    let instances = [("p", Role::Prefill, queued(0)), ("d", Role::Decode, full(8))];
    let board = board(settings, &instances);
    // Blocks of an answer are given back within 3.6 s: 128 steps of 28 ms. Of 17 a request, three or four may be ahead.
    let mut bookings = Vec::new();
    let refused = loop {
        match board.book(&roomy(200, 64)) {
            Ok(booking) => bookings.push(booking),
            Err(refused) => break refused,
        }
        assert!(bookings.len() < 20, "they are never too many");
    };
    assert_eq!(refused, NoPlace::Busy);
    assert!((2..=6).contains(&bookings.len()), "{}", bookings.len());
    // Neither who looks for another place waits, nor who needs no decode.
    placed(&board, 200).expect("a place");
    board.book(&roomy(200, 1)).expect("a place");
    // Room for one as soon as one has gone.
    bookings.pop();
    board.book(&roomy(200, 64)).expect("a place");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_wants_more_blocks_than_there_are_waits_only_for_those_that_it_begins_with() {
    let load = |kv_blocks_free| Load { kv_blocks_total: 40, kv_blocks_free, ..running(2) };
    let settings = Settings { room: Duration::from_secs(1), ..PLAIN };
    // 20 tokens and eight answers of 64: 34 blocks of which it begins with nine; of 16 answers, 65 and 17.
    let within = |free, choices| {
        let board = board(settings, &[("p", Role::Prefill, queued(0)), ("d", Role::Decode, load(free))]);
        board.book(&Wanted { choices, ..roomy(20, 64) }).map(drop)
    };
    assert_eq!(within(10, 8), Ok(()));
    assert_eq!(within(10, 16), Ok(()));
    assert_eq!(within(0, 8), Ok(()), "some are given back within the second");
    assert_eq!(within(0, 32), Err(NoPlace::Busy));
}

#[tokio::test(start_paused = true)]
async fn a_new_request_waits_while_a_mixed_instance_has_no_blocks_for_its_prompt() {
    let settings = Settings { room: Duration::from_secs(1), ..PLAIN };
    let within = |kv_blocks_free, prompt_tokens: u32| {
        let load = Load { kv_blocks_total: 400, kv_blocks_free, ..running(2) };
        let board = board(settings, &[("m", Role::Mixed, load)]);
        board.book(&roomy(prompt_tokens, 64)).map(drop)
    };
    assert_eq!(within(0, 100), Ok(()), "some are given back within the second");
    assert_eq!(within(0, 6000), Err(NoPlace::Busy));
    assert_eq!(within(390, 6000), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_prefill_instance_without_blocks_is_not_as_good_as_one_with() {
    let with = |free| Load { kv_blocks_total: 1_000, kv_blocks_free: free, ..queued(0) };
    let fleet = |p0, p1| {
        [("d", Role::Decode, running(1)), ("p0", Role::Prefill, with(p0)), ("p1", Role::Prefill, with(p1))]
    };
    for (p0, p1, best) in [(0, 900, "p1"), (900, 0, "p0"), (5, 900, "p1")] {
        for _ in 0..4 {
            assert_eq!(chosen(&board(PLAIN, &fleet(p0, p1)), 200)[0], best, "{p0} and {p1} free");
        }
    }
}
