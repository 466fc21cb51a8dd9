//! Prompts that decode computes itself.

use super::*;

const LOCAL: Settings = Settings { local_prefill_tokens: 500, ..PLAIN };
/// The first token is wanted within 500 ms.
const STRICT: Settings = Settings { targets: Targets { ttft: Duration::from_millis(500), ..AMPLE }, ..LOCAL };

fn fleet(queue: u64, batch: u32) -> [(&'static str, Role, Load); 2] {
    [("p", Role::Prefill, queued(queue)), ("d", Role::Decode, running(batch))]
}

fn apart() -> Vec<String> {
    ["p", "d"].map(str::to_owned).to_vec()
}

#[tokio::test(start_paused = true)]
async fn a_decode_instance_computes_a_short_prompt_itself_while_that_holds_up_nobody() {
    assert_eq!(chosen(&board(LOCAL, &fleet(0, 0)), 1), ["d"]);
    assert_eq!(chosen(&board(PLAIN, &fleet(0, 0)), 1), ["p", "d"], "unless it is not to");
    // 500 ms of a queue are worth standing still for, 4 sequences for 50 ms each; without a queue they are not.
    assert_eq!(chosen(&board(LOCAL, &fleet(1_000, 4)), 100), ["d"]);
    assert_eq!(chosen(&board(LOCAL, &fleet(0, 4)), 100), ["p", "d"]);
    assert_eq!(chosen(&board(LOCAL, &fleet(1_000, 40)), 100), ["p", "d"]);
    assert_eq!(chosen(&board(LOCAL, &fleet(9_000, 0)), 501), ["p", "d"], "it is too long");
    // It has no room, or its steps are too long already.
    let free = |kv_blocks_free| {
        let decode = Load { kv_blocks_free, ..running(0) };
        chosen(&board(LOCAL, &[("p", Role::Prefill, queued(9_000)), ("d", Role::Decode, decode)]), 300)
    };
    // Of 10,000 blocks 19 are for 301 tokens, and a tenth is left free.
    assert_eq!((free(1_018), free(1_019)), (apart(), vec!["d".to_owned()]));
    let hasty = Settings { targets: Targets { tpot: Duration::from_millis(10), ..AMPLE }, ..LOCAL };
    assert_eq!(chosen(&board(hasty, &fleet(9_000, 0)), 1), ["p", "d"]);
    // It computes 500 tokens in a chunk, for 250 ms, and decodes once before it has the first of its own.
    let (_, receipt) = placed(&board(LOCAL, &fleet(9_000, 3)), 500).expect("a place");
    let whole = receipt.cheapest.iter().find(|scored| scored.side == Side::Whole).expect("a candidate");
    assert!((272_000..276_000).contains(&whole.ttft_micros), "{}", whole.ttft_micros);
    // Whose cache is handed over stands still for it, too.
    let computing = Load { queued_prefill_tokens: 1_000, ..running(3) };
    let others =
        |d0| [("p", Role::Prefill, queued(0)), ("d0", Role::Decode, d0), ("d1", Role::Decode, running(4))];
    assert_eq!(chosen(&board(PLAIN, &others(running(3))), 100), ["p", "d0"]);
    assert_eq!(chosen(&board(PLAIN, &others(computing)), 100), ["p", "d1"]);
    // Nobody is turned into a mixed instance: with no prefill at all the fleet is not whole.
    let alone = board(LOCAL, &[("d", Role::Decode, running(0))]);
    assert_eq!(placed(&alone, 1).map(drop), Err(NoPlace::NoPrefill));
}

#[tokio::test(start_paused = true)]
async fn decode_computes_a_long_prompt_where_prefill_has_too_much_to_do_for_it() {
    let by = |settings, queue| chosen(&board(settings, &fleet(queue, 0)), 600);
    // It takes 300 ms, and what is queued 150 or 250.
    assert_eq!(by(STRICT, 300), ["p", "d"]);
    assert_eq!(by(STRICT, 500), ["d"]);
    assert_eq!(by(Settings { local_prefill_tokens: 0, ..STRICT }, 500), ["p", "d"]);
    // What is late wherever it is computed is not what decode is there for.
    assert_eq!(chosen(&board(STRICT, &fleet(500, 0)), 1_200), ["p", "d"]);
}

#[tokio::test(start_paused = true)]
async fn decode_computes_what_prefill_has_failed() {
    let avoid = [InstanceId::new("p").expect("a good id")];
    for prompt in [100, 5_000] {
        for (settings, serves) in [(LOCAL, vec!["d".to_owned()]), (PLAIN, apart())] {
            let board = board(settings, &fleet(0, 0));
            let booking = board.book(&Wanted { avoid: &avoid, ..Wanted::new(prompt, 64, "r1") });
            assert_eq!(instances(&booking.expect("a place").placement), serves, "{prompt}");
        }
    }
}

/// Else it would be bound to an instance that has no room, past all that wait.
#[tokio::test(start_paused = true)]
async fn room_on_decode_is_room_for_what_decode_is_to_compute() {
    let settings = Settings { room: Duration::from_secs(1), ..LOCAL };
    let by = |batch| {
        let booked = board(settings, &fleet(4_000, batch)).book(&roomy(100, 64));
        booked.map(|booking| instances(&booking.placement))
    };
    // 50 ms for itself and each sequence that stands still, or behind 2 s of a queue.
    assert_eq!(by(4), Ok(vec!["d".to_owned()]));
    assert_eq!(by(60), Err(NoPlace::Busy));
}
