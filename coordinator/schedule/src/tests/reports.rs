//! Whatever instances report: who is chosen is whoever is cheapest, and no number breaks the arithmetic.

use baton_proto::v1;
use proptest::prelude::*;

use super::*;

proptest! {
    /// Whoever is chosen is ready in the right role, and no instance of that role is cheaper.
    #[test]
    fn the_choice_is_the_cheapest(loads in prop::collection::vec((0u64..100_000, 0u32..50, 0u32..200), 2..12)) {
        let instances = loads.iter().enumerate().map(|(n, &(queued, sequences, free))| {
            let role = if n % 2 == 0 { Role::Prefill } else { Role::Decode };
            let load = Load {
                queued_prefill_tokens: queued,
                sequences,
                kv_blocks_total: 200,
                kv_blocks_free: free,
                ..Load::default()
            };
            (spec(&format!("i{n}")), role, load)
        });
        let fleet = fleet_of(instances.collect());
        let (placement, receipt) =
            placed(&fleet, &Ledger::default(), &ask(100)).expect("a pair is there");
        let Placement::Apart { prefill, decode } = placement else { panic!("nobody is mixed") };
        for (assignee, side) in [(prefill, Side::Prefill), (decode, Side::Decode)] {
            let least = receipt.cheapest.iter().find(|scored| scored.side == side);
            let held = receipt.cheapest.iter().find(|scored| scored.instance == assignee.instance);
            if let (Some(least), Some(held)) = (least, held) {
                prop_assert_eq!(held.cost_micros, least.cost_micros);
            }
        }
    }

    /// Whatever instances report, and however long the prompt, a request is placed.
    #[test]
    fn no_report_breaks_the_arithmetic(
        reports in prop::collection::vec(
            (extreme(), extreme(), extreme(), extreme(), extreme(), extreme()), 3..9
        ),
        prompt_tokens in extreme(),
        max_tokens in extreme(),
        on_wire in any::<bool>(),
    ) {
        let instances = reports.iter().enumerate().map(|(n, &(queued, sequences, total, free, rate, step))| {
            let role = [Role::Prefill, Role::Decode, Role::Mixed][n % 3];
            let load = if on_wire {
                (&v1::InstanceLoad {
                    running_sequences: sequences as u32,
                    waiting_sequences: sequences as u32,
                    queued_prefill_tokens: queued,
                    kv_blocks_total: total as u32,
                    kv_blocks_free: free as u32,
                    prefill_tokens_per_second: rate,
                    decode_step_micros: step,
                    ..Default::default()
                })
                    .into()
            } else {
                Load {
                    sequences: sequences as u32,
                    queued_prefill_tokens: queued,
                    kv_blocks_total: total as u32,
                    kv_blocks_free: free as u32,
                    prefill_tokens_per_second: rate,
                    decode_step_micros: step,
                    ..Load::default()
                }
            };
            (Spec { context_tokens: 0, ..spec(&format!("i{n}")) }, role, load)
        });
        let fleet = fleet_of(instances.collect());
        let mut ledger = Ledger::default();
        let work = Work { prefill_tokens: prompt_tokens, sequences: 1, blocks: max_tokens, ..Work::default() };
        ledger.credit(&InstanceId::new("i0").expect("a good id"), work);
        let ask = ask_for(Wanted::new(prompt_tokens as u32, max_tokens as u32, "r1"));
        for local_prefill_tokens in [0, 1, u32::MAX] {
            let settings = Settings { local_prefill_tokens, ..SETTINGS };
            let placed = choose::choose(&view(&fleet, &ledger), &ask, &settings, Instant::now());
            prop_assert!(placed.is_ok() || matches!(placed, Err(NoPlace::TooLarge(_) | NoPlace::NoPrefill | NoPlace::NoDecode)));
        }
    }
}

/// Mostly the ends of the range, where sums and products overflow.
fn extreme() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(1), Just(u64::from(u32::MAX)), Just(u64::MAX), Just(u64::MAX / 2), any::<u64>()]
}

#[test]
fn a_step_that_does_not_fit_the_wire_still_compares() {
    let wire = v1::InstanceLoad { decode_step_micros: u64::MAX, ..Default::default() };
    let fleet = fleet_of(vec![
        (spec("p"), Role::Prefill, Load::default()),
        (spec("a"), Role::Decode, Load { sequences: 9, ..(&wire).into() }),
        (spec("b"), Role::Decode, (&wire).into()),
        (spec("c"), Role::Decode, Load { decode_step_micros: 9_000, ..Load::default() }),
    ]);
    assert_eq!(chosen(&fleet, &Ledger::default(), &ask(10)).expect("places")[1], "c");
}
