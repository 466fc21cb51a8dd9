//! Tables over fleets: who is chosen, and what is said when nobody can be.

use std::time::Duration;

use baton_proto::{GroupName, Protocols};
use tokio::time::Instant;

use super::{
    caches::{Caches, Subject},
    chains::{Chains, Dialect, KnownStrides},
    fleet::{
        Fleet, Load, Role, Spec, Timed,
        testing::{ready, spec},
    },
    ledger::{Ledger, Work},
    predict::Speeds,
    view::View,
    *,
};

fn fleet(instances: &[(&str, Role)]) -> Fleet {
    fleet_of(instances.iter().map(|(id, role)| (spec(id), *role, Load::default())).collect())
}

fn fleet_of(instances: Vec<(Spec, Role, Load)>) -> Fleet {
    let mut fleet = Fleet::new(Duration::from_secs(1));
    let mut specs: Vec<_> = instances.iter().map(|(spec, ..)| spec.clone()).collect();
    specs.sort_by(|a, b| a.id.cmp(&b.id));
    fleet.list(&specs, Instant::now());
    for (spec, role, load) in instances {
        fleet.up(&spec.id, spec.incarnation, ready(role));
        fleet.load(&spec.id, load);
    }
    fleet
}

/// All of these have served for long.
fn view(fleet: &Fleet, ledger: &Ledger) -> View {
    let (mut view, mut speeds) = (View::default(), Speeds::default());
    let instances = fleet.models().flat_map(|(_, alike)| alike.values());
    for instance in instances {
        // Often enough to be believed.
        (0..50).for_each(|steps| {
            speeds.reported(&instance.spec, &after(steps, instance.load()), Instant::now());
        });
    }
    view.listed(fleet, ledger, &speeds, Instant::now());
    view
}

/// What an instance tells after so many steps of each kind, which took what it says that they take.
fn after(steps: u64, load: Load) -> Load {
    let mut timed = Timed::default();
    if let Some(micros) = 512_000_000u64.checked_div(load.prefill_tokens_per_second) {
        timed.prefill_micros = steps.saturating_mul(micros);
        (timed.prefill_steps, timed.prefill_tokens) = (steps, steps * 512);
    }
    if load.decode_step_micros > 0 {
        timed.decode_micros = steps.saturating_mul(load.decode_step_micros);
        (timed.decode_steps, timed.decode_sequences) = (steps, steps * u64::from(load.batch()));
    }
    Load { timed, ..load }
}

const SETTINGS: Settings = Settings {
    warm_up: Duration::ZERO,
    targets: Targets { ttft: Duration::MAX, ttft_per_1k_tokens: Duration::ZERO, tpot: Duration::MAX },
    ..Settings::APART
};

fn placed(fleet: &Fleet, ledger: &Ledger, ask: &Ask<'_>) -> Result<(Placement, Receipt), NoPlace> {
    choose::choose(&view(fleet, ledger), ask, &SETTINGS, Instant::now())
}

fn ask(prompt_tokens: u32) -> Ask<'static> {
    ask_for(Wanted::new(prompt_tokens, 64, "r1"))
}

fn ask_for(wanted: Wanted<'_>) -> Ask<'_> {
    Ask { wanted, held: Held::default(), expected_tokens: 128, nth: 0 }
}

fn chosen(fleet: &Fleet, ledger: &Ledger, ask: &Ask<'_>) -> Result<Vec<String>, NoPlace> {
    let (placement, _) = placed(fleet, ledger, ask)?;
    Ok(match placement {
        Placement::Alone(assignee) => vec![assignee.instance.to_string()],
        Placement::Apart { prefill, decode } => {
            vec![prefill.instance.to_string(), decode.instance.to_string()]
        }
    })
}

#[test]
fn a_pair_or_a_mixed_instance_serves() {
    let none = Ledger::default();
    let pair = fleet(&[("d", Role::Decode), ("p", Role::Prefill)]);
    assert_eq!(chosen(&pair, &none, &ask(10)).as_deref(), Ok(&["p".to_owned(), "d".to_owned()][..]));
    let alone = fleet(&[("m", Role::Mixed)]);
    assert_eq!(chosen(&alone, &none, &ask(10)).as_deref(), Ok(&["m".to_owned()][..]));
}

#[test]
fn one_token_is_prefills_work_alone() {
    let none = Ledger::default();
    let one = ask_for(Wanted::new(10, 1, "r1"));
    let pair = fleet(&[("d", Role::Decode), ("p", Role::Prefill)]);
    assert_eq!(chosen(&pair, &none, &one).as_deref(), Ok(&["p".to_owned()][..]));
    assert_eq!(chosen(&fleet(&[("d", Role::Decode)]), &none, &one), Err(NoPlace::NoPrefill));
    // By whatever it is chosen, and however many pairs there are beside.
    let several =
        fleet(&[("d", Role::Decode), ("e", Role::Decode), ("p", Role::Prefill), ("q", Role::Prefill)]);
    let plain = Policy::ALL.map(|policy| Settings { policy, ..SETTINGS });
    let settings = plain.into_iter().chain([Settings { temperature: 100.0, ..SETTINGS }]);
    for settings in settings {
        for nth in 0..20 {
            let view = view(&several, &none);
            let (placement, _) =
                choose::choose(&view, &Ask { nth, ..one }, &settings, Instant::now()).expect("a place");
            let Placement::Alone(alone) = placement else {
                panic!("{settings:?} hands it over: {placement:?}")
            };
            assert!(["p", "q"].contains(&alone.instance.as_str()), "{settings:?}");
        }
    }
}

#[test]
fn each_choice_takes_a_seat_and_blocks_of_its_own() {
    let pair = fleet(&[("d", Role::Decode), ("p", Role::Prefill)]);
    let blocks = |choices| {
        let ask = ask_for(Wanted { choices, ..Wanted::new(32, 64, "r1") });
        match placed(&pair, &Ledger::default(), &ask) {
            Ok((Placement::Apart { decode, .. }, _)) => decode.blocks,
            other => panic!("{other:?}"),
        }
    };
    // Two blocks of 16 tokens for the prompt, four for the 64 tokens of each answer.
    assert_eq!([blocks(1), blocks(3)], [6, 14]);
}

#[test]
fn what_lacks_is_said() {
    let none = Ledger::default();
    let cases = [
        (vec![], NoPlace::NoInstance),
        (vec![("x", Role::None)], NoPlace::NoInstance),
        (vec![("p", Role::Prefill)], NoPlace::NoDecode),
        (vec![("d", Role::Decode)], NoPlace::NoPrefill),
    ];
    for (instances, why) in cases {
        assert_eq!(chosen(&fleet(&instances), &none, &ask(10)), Err(why));
    }
    let small = Load { kv_blocks_total: 2, kv_blocks_free: 2, ..Load::default() };
    let fleet = fleet_of(vec![(spec("m"), Role::Mixed, small)]);
    assert!(chosen(&fleet, &none, &ask(31)).is_ok());
    assert_eq!(chosen(&fleet, &none, &ask(32)), Err(NoPlace::TooLarge(32)));
}

#[test]
fn unlike_instances_are_never_paired() {
    type Change = fn(&mut Spec);
    let changes: [Change; 4] = [
        |spec| spec.group = GroupName::new("other").expect("a good name"),
        |spec| spec.revision = "r2".into(),
        |spec| spec.layout = "l2".into(),
        |spec| spec.handoff_protocols = Protocols::between(2, 2),
    ];
    for change in changes {
        let mut decode = spec("d");
        change(&mut decode);
        let fleet = fleet_of(vec![
            (spec("p"), Role::Prefill, Load::default()),
            (decode, Role::Decode, Load::default()),
        ]);
        assert_eq!(chosen(&fleet, &Ledger::default(), &ask(10)), Err(NoPlace::NoDecode));
    }
}

#[test]
fn only_the_model_that_the_prompt_was_tokenised_for_is_given_it() {
    let none = Ledger::default();
    // Two directories of the same name, say.
    let namesake = Spec { revision: "r9".into(), ..spec("m") };
    let fleet = fleet_of(vec![(namesake.clone(), Role::Mixed, Load::default())]);
    assert_eq!(chosen(&fleet, &none, &ask(10)), Err(NoPlace::OtherModel));
    let renamed = Spec { model: "its name here".into(), ..spec("n") };
    let both = fleet_of(vec![
        (namesake, Role::Mixed, Load::default()),
        (renamed, Role::Mixed, Load { queued_prefill_tokens: 1 << 30, ..Load::default() }),
    ]);
    assert_eq!(chosen(&both, &none, &ask(10)).as_deref(), Ok(&["n".to_owned()][..]));
}

#[test]
fn each_model_has_its_own_instances_and_lacks_its_own() {
    let none = Ledger::default();
    let of = |id: &str, revision: &str| Spec { revision: revision.into(), ..spec(id) };
    let fleet = fleet_of(vec![
        (of("a", "r1"), Role::Mixed, Load { queued_prefill_tokens: 1 << 30, ..Load::default() }),
        (of("p", "r2"), Role::Prefill, Load::default()),
        (of("d", "r2"), Role::Decode, Load::default()),
        (of("q", "r3"), Role::Prefill, Load::default()),
        (of("x", "r4"), Role::None, Load::default()),
    ]);
    let asked = |revision| chosen(&fleet, &none, &ask_for(Wanted::new(10, 64, revision)));
    assert_eq!(asked("r1").as_deref(), Ok(&["a".to_owned()][..]), "others that are idle are none of its");
    assert_eq!(asked("r2").as_deref(), Ok(&["p".to_owned(), "d".to_owned()][..]));
    assert_eq!(asked("r3"), Err(NoPlace::NoDecode));
    assert_eq!(asked("r4"), Err(NoPlace::NoInstance));
    assert_eq!(asked("r5"), Err(NoPlace::OtherModel));
    let (_, receipt) = placed(&fleet, &none, &ask(10)).expect("places");
    assert_eq!(receipt.candidates, 1);
    let told = NoPlace::NoDecode.into_api_error("small");
    assert_eq!((told.code, told.message.starts_with("model `small`: ")), (ErrorCode::Unavailable, true));
}

#[test]
fn a_request_is_too_large_only_if_nobody_who_may_come_could_hold_it() {
    let none = Ledger::default();
    let small = Load { kv_blocks_total: 2, kv_blocks_free: 2, ..Load::default() };
    let large = Load::default();
    type Instances<'a> = &'a [(&'a str, Role, Load)];
    let of = |instances: Instances<'_>| {
        fleet_of(instances.iter().map(|(id, role, load)| (spec(id), *role, *load)).collect())
    };
    let cases: [(Instances<'_>, NoPlace); 6] = [
        (&[("m", Role::Mixed, small)], NoPlace::TooLarge(100)),
        (&[("p", Role::Prefill, large), ("d", Role::Decode, small)], NoPlace::TooLarge(100)),
        (&[("p", Role::Prefill, small), ("d", Role::Decode, large)], NoPlace::TooLarge(100)),
        // The pair's other half would do.
        (&[("p", Role::Prefill, large), ("m", Role::Mixed, small)], NoPlace::NoDecode),
        (&[("d", Role::Decode, large), ("m", Role::Mixed, small)], NoPlace::NoPrefill),
        // An instance that has no role is not too small for one.
        (&[("x", Role::None, small)], NoPlace::NoInstance),
    ];
    for (instances, why) in cases {
        assert_eq!(chosen(&of(instances), &none, &ask(100)), Err(why), "{instances:?}");
    }
    // A large one has just gone away.
    let mut fleet = of(&[("m", Role::Mixed, small), ("n", Role::Mixed, large)]);
    fleet.down(&spec("n").id, Instant::now());
    assert_eq!(chosen(&fleet, &none, &ask(100)), Err(NoPlace::NoInstance));
    assert_eq!(NoPlace::TooLarge(100).into_api_error("m").code.http(), 400, "the client has to shorten it");
    assert!(NoPlace::NoInstance.may_pass() && !NoPlace::TooLarge(100).may_pass());
}

#[test]
fn the_least_queued_prefill_and_the_emptiest_decode_are_taken() {
    let queued = |tokens| Load { queued_prefill_tokens: tokens, ..Load::default() };
    let running = |sequences, kv_blocks_free| Load {
        sequences,
        decode_step_micros: 10_000,
        kv_blocks_total: 100,
        kv_blocks_free,
        ..Load::default()
    };
    let fleet = fleet_of(vec![
        (spec("p0"), Role::Prefill, queued(5_000)),
        (spec("p1"), Role::Prefill, queued(100)),
        (spec("d0"), Role::Decode, running(1, 0)),
        (spec("d1"), Role::Decode, running(1, 90)),
    ]);
    let both = ["p1".to_owned(), "d1".to_owned()];
    assert_eq!(chosen(&fleet, &Ledger::default(), &ask(50)).as_deref(), Ok(&both[..]));
}

#[test]
fn rates_turn_queues_into_time() {
    let load = |tokens, rate| Load {
        queued_prefill_tokens: tokens,
        prefill_tokens_per_second: rate,
        ..Load::default()
    };
    let fleet = fleet_of(vec![
        (spec("fast"), Role::Prefill, load(4_000, 40_000)),
        (spec("slow"), Role::Prefill, load(1_000, 1_000)),
        (spec("d"), Role::Decode, Load::default()),
    ]);
    assert_eq!(chosen(&fleet, &Ledger::default(), &ask(50)).expect("places")[0], "fast");
}

fn number(fleet: &Fleet, id: &str) -> u32 {
    let id = InstanceId::new(id).expect("a good id");
    view(fleet, &Ledger::default()).row(&id).map_or(0, |row| row.number)
}

/// Who is chosen for a prompt of 1,000 tokens of which these instances have so many blocks of 16, with the receipt.
fn chosen_of(fleet: &Fleet, cached: &[(&str, usize)]) -> (Vec<String>, Receipt) {
    let dialect = Dialect::new("l", 16).expect("16 tokens");
    let chains = Chains::new((0..1000).collect()).say(&[dialect], &[], &KnownStrides::default());
    let caches = Caches::new(1 << 20, 0);
    let feeds: Vec<_> = cached
        .iter()
        .map(|(id, blocks)| {
            let mut feed = caches.feed(Subject { instance: number(fleet, id), revision: "r1".into() });
            feed.begin();
            feed.store(&chains[0].keys[..*blocks]);
            feed.publish(dialect).expect("one dialect");
            feed
        })
        .collect();
    let now = Instant::now();
    let mut state = caches.lock();
    let ask = Ask { held: state.look(&chains, now), ..ask(1000) };
    let (placement, receipt) = placed(fleet, &Ledger::default(), &ask).expect("places");
    drop(state);
    drop(feeds);
    let Placement::Apart { prefill, decode } = placement else { panic!("nobody is mixed") };
    (vec![prefill.instance.to_string(), decode.instance.to_string()], receipt)
}

#[test]
fn what_is_cached_is_neither_computed_nor_moved() {
    let queued = |tokens| Load { queued_prefill_tokens: tokens, ..Load::default() };
    let large = |id| Spec { token_bytes: 100_000, ..spec(id) };
    let fleet = |tokens| {
        fleet_of(vec![
            (spec("p0"), Role::Prefill, queued(tokens)),
            (spec("p1"), Role::Prefill, queued(0)),
            (large("d0"), Role::Decode, Load::default()),
            (large("d1"), Role::Decode, Load::default()),
        ])
    };
    // 40 tokens of it are left to p0: as long as less than 960 are before them it is done sooner.
    for (tokens, prefill) in [(0, "p0"), (950, "p0"), (970, "p1")] {
        for decode in ["d0", "d1"] {
            let (chosen, receipt) = chosen_of(&fleet(tokens), &[("p0", 60), ("p1", 0), (decode, 10)]);
            assert_eq!(chosen, [prefill, decode], "{tokens} queued");
            let of = |id: &str| receipt.cheapest.iter().find(|scored| scored.instance.as_str() == id);
            let cached = |id| of(id).map(|scored| scored.cached_tokens);
            assert_eq!(["p0", "p1", decode].map(cached), [Some(960), Some(0), Some(160)]);
            // 0.5 ms a token of a machine that is not measured; 10 µs a token of the link.
            assert_eq!(of("p0").map(|scored| scored.cost_micros), Some((tokens + 40) * 500));
            let costs = ["d0", "d1"].map(|id| of(id).map_or(0, |scored| scored.cost_micros));
            assert_eq!(costs[0].abs_diff(costs[1]), 1_600);
        }
    }
}

#[test]
fn the_last_token_is_computed_by_whoever_goes_on_from_it() {
    let fleet = fleet(&[("p", Role::Prefill), ("d", Role::Decode)]);
    let (_, receipt) = chosen_of(&fleet, &[("p", 62), ("d", 62)]);
    let cached = |side| receipt.cheapest.iter().find(|scored| scored.side == side).map(|s| s.cached_tokens);
    assert_eq!((cached(Side::Prefill), cached(Side::Decode)), (Some(992), Some(992)));
    let caches = Caches::new(1 << 20, 0);
    let mut feed = caches.feed(Subject { instance: number(&fleet, "p"), revision: "r1".into() });
    let dialect = Dialect::new("l", 16).expect("16 tokens");
    let chains = Chains::new((0..32).collect()).say(&[dialect], &[], &KnownStrides::default());
    feed.begin();
    feed.store(&chains[0].keys);
    feed.publish(dialect).expect("one dialect");
    let mut state = caches.lock();
    let ask = Ask { held: state.look(&chains, Instant::now()), ..ask(32) };
    let view = view(&fleet, &Ledger::default());
    let row = view.row(&spec("p").id).expect("it is there");
    let cached = |side| cost::cached_tokens(row, &ask, side);
    assert_eq!([Side::Prefill, Side::Whole, Side::Decode].map(cached), [16, 16, 32]);
    drop(state);
}

#[test]
fn only_what_is_to_be_computed_is_on_the_ledger() {
    let every_block = Settings { index_every_tokens: 0, ..Settings::APART };
    let board = board::Board::new(Duration::from_secs(1), every_block);
    let (p, d) = (spec("p"), spec("d"));
    board.list(&[d.clone(), p.clone()], Instant::now());
    board.up(&p.id, p.incarnation, ready(Role::Prefill));
    board.up(&d.id, d.incarnation, ready(Role::Decode));
    let dialect = Dialect::new("l", 16).expect("16 tokens");
    let chains = Chains::new((0..1000).collect()).say(&[dialect], &[], &KnownStrides::default());
    let mut feed = board.feed(&p.id);
    feed.begin();
    feed.store(&chains[0].keys[..40]);
    feed.publish(dialect).expect("one dialect");
    assert_eq!(board.caches.dialects("r1"), [dialect]);
    let prompt = Prompt { tokens: 1000, chains: &chains };
    let work = || board.own_work().iter().find(|(id, _)| *id == p.id).map(|(_, work)| work.prefill_tokens);
    let mut first = board.book(&Wanted::new(prompt, 8, "r1")).expect("a place");
    assert_eq!(work(), Some(360));
    // The rest is expected there now.
    let second = board.book(&Wanted::new(prompt, 8, "r1")).expect("a place");
    assert_eq!(work(), Some(360 + 8));
    first.credit.prefilled();
    drop((first, second));
    assert_eq!(work(), Some(0));
}

#[test]
fn work_just_placed_turns_the_next_request_away() {
    let fleet = fleet(&[("p0", Role::Prefill), ("p1", Role::Prefill), ("d", Role::Decode)]);
    let mut ledger = Ledger::default();
    let first = chosen(&fleet, &ledger, &ask(100)).expect("places")[0].clone();
    let id = InstanceId::new(first.clone()).expect("a good id");
    ledger.credit(&id, Work { prefill_tokens: 100, sequences: 1, blocks: 1, ..Work::default() });
    assert_ne!(chosen(&fleet, &ledger, &ask(100)).expect("places")[0], first);
}

#[test]
fn equal_costs_take_turns_within_a_role_and_whoever_else_is_there() {
    let board = board::Board::new(Duration::from_secs(1), Settings::APART);
    let names = ["d0", "d1", "p0", "p1", "p2", "x"];
    let specs: Vec<Spec> = names.iter().map(|id| spec(id)).collect();
    board.list(&specs, Instant::now());
    for of in &specs[..5] {
        let role = if of.id.as_str().starts_with('d') { Role::Decode } else { Role::Prefill };
        board.up(&of.id, of.incarnation, ready(role));
    }
    let mut seen = [0; 6];
    for _ in 0..6 {
        let Placement::Apart { prefill, decode } =
            board.book(&Wanted::new(1, 8, "r1")).expect("a place").placement
        else {
            panic!("nobody is mixed")
        };
        for assignee in [prefill, decode] {
            seen[names.iter().position(|id| *id == assignee.instance.as_str()).expect("one of them")] += 1;
        }
    }
    assert_eq!(seen, [3, 3, 2, 2, 2, 0]);
}

/// How often each of these is taken, of 300 requests, each of which ends before the next.
fn taken(settings: Settings, loads: &[(&str, Role, u32)]) -> Vec<u32> {
    let board = board::Board::new(Duration::from_secs(1), settings);
    let specs: Vec<Spec> = loads.iter().map(|(id, ..)| spec(id)).collect();
    board.list(&specs, Instant::now());
    for (of, (_, role, sequences)) in specs.iter().zip(loads) {
        board.up(&of.id, of.incarnation, ready(*role));
        board.load(&of.id, Load { sequences: *sequences, ..Load::default() });
    }
    let mut taken = vec![0; loads.len()];
    for _ in 0..300 {
        let placement = board.book(&Wanted::new(1, 8, "r1")).expect("a place").placement;
        let Placement::Apart { prefill, decode } = placement else { panic!("nobody is mixed") };
        for assignee in [prefill, decode] {
            taken[specs.iter().position(|spec| spec.id == assignee.instance).expect("one of them")] += 1;
        }
    }
    taken
}

#[test]
fn plain_policies_do_what_they_are_called() {
    let loads = [
        ("d0", Role::Decode, 0),
        ("d1", Role::Decode, 2),
        ("d2", Role::Decode, 1),
        ("p0", Role::Prefill, 3),
        ("p1", Role::Prefill, 0),
    ];
    let by = |policy| taken(Settings { policy, ..Settings::APART }, &loads);
    assert_eq!(by(Policy::RoundRobin), [100, 100, 100, 150, 150]);
    assert_eq!(by(Policy::LeastLoad), [300, 0, 0, 0, 300]);
    // Of two of the three the emptier: d1 never, d0 in two of the three draws, and p1 whenever both are drawn.
    let two = by(Policy::PowerOfTwo);
    assert_eq!((two[1], two[4]), (0, 300));
    assert!((170..230).contains(&two[0]), "{two:?}");
    let board = board::Board::new(Duration::ZERO, Settings { policy: Policy::RoundRobin, ..Settings::APART });
    board.list(&["d", "m", "p"].map(spec), Instant::now());
    for (id, role) in [("d", Role::Decode), ("m", Role::Mixed), ("p", Role::Prefill)] {
        board.up(&spec(id).id, Incarnation(1), ready(role));
    }
    let alone =
        |_| matches!(board.book(&Wanted::new(1, 8, "r1")).map(|b| b.placement), Ok(Placement::Alone(_)));
    assert_eq!((0..10).filter(|nth| alone(*nth)).count(), 5, "a pair is one of two in turn");
    let warm = Settings { temperature: 0.5, ..Settings::APART };
    let drawn = taken(warm, &loads);
    assert!(drawn.iter().all(|times| *times > 0), "{drawn:?}");
    assert!(drawn[0] > drawn[1], "the cheaper is drawn more often: {drawn:?}");
}

#[test]
fn the_receipt_keeps_the_cheapest_in_order() {
    let instances: Vec<_> = (0..20)
        .map(|n| {
            let load = Load { queued_prefill_tokens: 1000 * ((n * 7) % 20), ..Load::default() };
            (spec(&format!("m{n}")), Role::Mixed, load)
        })
        .collect();
    let (placement, receipt) = placed(&fleet_of(instances), &Ledger::default(), &ask(10)).expect("places");
    assert_eq!((receipt.candidates, receipt.cheapest.len()), (20, 4));
    assert!(receipt.cheapest.is_sorted_by_key(|scored| scored.cost_micros));
    assert!(
        matches!(placement, Placement::Alone(assignee) if assignee.instance == receipt.cheapest[0].instance)
    );
}

mod builds;
mod reports;
mod room;
