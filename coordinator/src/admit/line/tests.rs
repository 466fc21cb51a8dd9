//! Who is let in and when, over a board of one instance.

use baton_proto::ErrorCode;
use baton_schedule::{
    Settings,
    board::Board,
    fleet::{
        Load, Role,
        testing::{ready, spec},
    },
};

use super::attend::{LOOK_LEAST, LOOK_MOST};
use super::*;
use crate::{
    admit::{Gate, RETRY_AFTER},
    fleet::keeper::Attachments,
    metrics::Metrics,
    models::{Model, Models},
    place::tests::placer,
    prepare::{
        Endpoint, parse, prepare,
        tests::{LIMITS, served},
    },
};

struct House {
    gate: Gate,
    model: Arc<Model>,
    placer: Arc<Placer>,
    metrics: Arc<Metrics>,
}

const WITHIN: Duration = Duration::from_secs(5);
/// How long anybody waits for an instance that is not there.
const AWAITED: Duration = Duration::from_secs(3);

fn house(max_concurrent: usize, max_queued: usize) -> House {
    let limits = LimitsConfig {
        max_concurrent,
        max_queued,
        queue_timeout: WITHIN,
        placement_timeout: AWAITED,
        ..LimitsConfig::default()
    };
    let metrics = baton_process::Metrics::new("coordinator").register(Metrics::register);
    let models = Models::new(vec![served()], &limits, &metrics).expect("one model");
    let settings = Settings { room: Duration::from_secs(1), ..Settings::default() };
    let board = Board::new(Duration::from_secs(60), settings);
    let only = spec("a");
    board.list(std::slice::from_ref(&only), Instant::now());
    board.up(&only.id, only.incarnation, ready(Role::Mixed));
    let model = models.iter().next().expect("a model").clone();
    let placer = Arc::new(placer(board, Attachments::default()));
    House { gate: Gate::new(&limits, 2, 2, &metrics), model, placer, metrics }
}

impl House {
    fn enter(&self, priority: i32) -> Result<(Ticket, Spot), ApiError> {
        let (line, tenant) = (&self.model.line, Tenant::default());
        let rank = tenant.rank(priority);
        Ok((self.gate.enter(|| None, || line.has_behind(&rank)).expect("room"), line.enter(&rank)?))
    }

    async fn admitted(&self, priority: i32, deadline: Duration) -> Result<Admission, ApiError> {
        let body = format!(r#"{{"model": "tiny", "prompt": "hi", "priority": {priority}}}"#);
        let request = parse(body.as_bytes()).expect("is JSON");
        let prepared = prepare(&self.model.served, Endpoint::Text, &request, LIMITS, 1).expect("is good");
        let (tenant, now) = (Tenant::default(), Instant::now());
        let (ticket, place) = self.enter(priority)?;
        let request = &RequestId::generate();
        let terms = WaitTerms { request, tenant: &tenant, arrived: now, deadline: now + deadline };
        self.model.line.admit(&self.placer, ticket, place, prepared, terms).await
    }

    async fn seat(&self) -> Result<Admission, ApiError> {
        self.admitted(0, Duration::from_secs(600)).await
    }

    /// The instance says how many prompt tokens are queued there.
    fn queued(&self, tokens: u64) {
        self.placer.board.load(&spec("a").id, Load { queued_prefill_tokens: tokens, ..Load::default() });
    }

    fn waiting(&self) -> [i64; 3] {
        let counts = &self.model.counts;
        [self.metrics.queued.get(), counts.queued.get(), counts.queued_by_band[1].get()]
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_line_turns_away_and_a_seat_given_back_lets_in() {
    let house = house(1, 1);
    let first = house.seat().await.expect("a seat");
    assert!(!first.bookings.is_empty() && first.waited.is_zero());
    let mut second = Box::pin(house.seat());
    assert!(futures::poll!(&mut second).is_pending());
    assert_eq!((house.metrics.in_flight.get(), house.waiting()), (1, [1; 3]));
    let refused = house.seat().await.err().expect("the line is full");
    assert_eq!((refused.code, refused.retry_after), (ErrorCode::QueueFull, Some(RETRY_AFTER)));
    tokio::time::sleep(Duration::from_millis(10)).await;
    drop(first);
    let second = second.await.expect("the seat given back");
    assert!(!second.bookings.is_empty() && !second.waited.is_zero());
    assert_eq!((house.metrics.in_flight.get(), house.waiting()), (1, [0; 3]));
    drop(second);
    assert!(house.enter(0).is_ok());
    assert_eq!(house.metrics.in_flight.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn whoever_comes_to_a_full_line_takes_the_place_of_one_that_may_wait_for_it() {
    let (house, long) = (house(1, 2), Duration::from_secs(600));
    let first = house.seat().await.expect("a seat");
    let (mut early, mut late) = (Box::pin(house.admitted(5, long)), Box::pin(house.admitted(5, long)));
    assert!(futures::poll!(&mut early).is_pending() && futures::poll!(&mut late).is_pending());
    let refused = house.admitted(5, long).await.err().expect("it is of no higher priority");
    assert!(refused.message.starts_with("too many requests are waiting"), "{}", refused.message);
    // Whoever comes to nothing takes nobody's place.
    drop(house.enter(0).expect("a place beside the line"));
    let mut higher = Box::pin(house.admitted(0, long));
    assert!(futures::poll!(&mut higher).is_pending());
    let outranked = late.await.err().expect("its place is taken");
    assert!(outranked.code == ErrorCode::QueueFull && outranked.retry_after.is_some(), "{outranked:?}");
    assert!(outranked.message.starts_with("others who go before it"), "{}", outranked.message);
    assert_eq!(house.waiting(), [2; 3]);
    tokio::time::sleep(Duration::from_millis(10)).await;
    drop(first);
    drop(higher.await.expect("the seat given back"));
    drop(early.await.expect("the seat given back"));
    assert_eq!((house.metrics.in_flight.get(), house.waiting()), (0, [0; 3]));
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_is_placed_when_an_instance_has_room() {
    let house = house(8, 8);
    house.queued(100_000);
    let mut waits = Box::pin(house.seat());
    assert!(tokio::time::timeout(Duration::from_secs(3), &mut waits).await.is_err());
    let before = Instant::now();
    house.queued(0);
    let placed = waits.await.expect("room");
    assert!(before.elapsed() <= 2 * LOOK_LEAST, "{:?}", before.elapsed());
    assert!(!placed.bookings.is_empty() && placed.waited >= Duration::from_secs(3));
    // Nobody waits: the next one goes at once, though it finds the first there.
    assert!(house.seat().await.expect("room").waited.is_zero());
}

#[tokio::test(start_paused = true)]
async fn no_more_wait_than_may_however_many_seats_are_free() {
    let house = house(8, 1);
    house.queued(100_000);
    let mut waits = Box::pin(house.seat());
    assert!(futures::poll!(&mut waits).is_pending());
    let refused = house.seat().await.err().expect("one waits already");
    assert!(refused.message.starts_with("too many requests are waiting"), "{}", refused.message);
    let mut first = Box::pin(house.admitted(-1, WITHIN));
    assert!(futures::poll!(&mut first).is_pending());
    assert_eq!(waits.await.err().expect("its place is taken").code, ErrorCode::QueueFull);
    house.queued(0);
    drop(first.await.expect("room"));
    assert_eq!(house.waiting(), [0; 3]);
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_is_coming_is_waited_for_in_line_and_not_for_long() {
    let house = house(1, 8);
    let (only, board) = (spec("a"), house.placer.board.clone());
    board.down(&only.id, Instant::now());
    let began = Instant::now();
    let refused = house.seat().await.err().expect("nobody comes");
    assert_eq!(refused.code, ErrorCode::Unavailable);
    let waited = began.elapsed();
    assert!(waited >= AWAITED && waited <= AWAITED + 2 * LOOK_MOST, "{waited:?}");

    // One that was busy goes away: those who wait do so for as long again, and for no longer than they may.
    board.up(&only.id, only.incarnation, ready(Role::Mixed));
    house.queued(100_000);
    let (mut first, mut second) =
        (Box::pin(house.admitted(5, WITHIN * 2)), Box::pin(house.admitted(0, WITHIN * 2)));
    assert!(futures::poll!(&mut first).is_pending() && futures::poll!(&mut second).is_pending());
    tokio::time::sleep(Duration::from_secs(1)).await;
    board.down(&only.id, Instant::now());
    assert!(tokio::time::timeout(AWAITED - LOOK_MOST, &mut first).await.is_err());
    // It comes back, and takes one at a time, in the order of the line.
    board.up(&only.id, only.incarnation, ready(Role::Mixed));
    house.queued(0);
    let second = second.await.expect("a seat");
    assert!(futures::poll!(&mut first).is_pending());
    drop(second);
    assert!(!first.await.expect("the next seat").bookings.is_empty());
}

#[tokio::test(start_paused = true)]
async fn those_that_are_turned_away_say_nothing_of_how_long_others_will_wait() {
    let house = house(8, 8);
    let (only, board) = (spec("a"), house.placer.board.clone());
    house.queued(100_000);
    let mut waits: Vec<_> = (0..8).map(|_| Box::pin(house.admitted(0, WITHIN * 2))).collect();
    for one in &mut waits {
        assert!(futures::poll!(one).is_pending());
    }
    board.down(&only.id, Instant::now());
    for one in waits {
        assert_eq!(one.await.err().expect("nobody comes").code, ErrorCode::Unavailable);
    }
    board.up(&only.id, only.incarnation, ready(Role::Mixed));
    house.queued(100_000);
    let mut next = Box::pin(house.seat());
    assert!(futures::poll!(&mut next).is_pending());
    assert_eq!(house.model.line.drain(), None, "nobody was served");
}

#[tokio::test(start_paused = true)]
async fn what_a_request_has_waited_is_off_the_time_that_its_first_token_may_take() {
    let house = house(1, 1);
    let cost = |admitted: &Admission| admitted.bookings[0].booking.receipt.cost_micros;
    let first = house.seat().await.expect("a seat");
    let at_once = cost(&first);
    let mut second = Box::pin(house.seat());
    assert!(futures::poll!(&mut second).is_pending());
    tokio::time::sleep(WITHIN - Duration::from_secs(1)).await;
    drop(first);
    let late = cost(&second.await.expect("the seat given back"));
    assert!(late > at_once, "{late}, and {at_once} at once");
}

#[tokio::test(start_paused = true)]
async fn what_nobody_could_hold_waits_for_nobody() {
    let house = house(1, 1);
    let tiny = Load { kv_blocks_total: 1, kv_blocks_free: 1, ..Load::default() };
    house.placer.board.load(&spec("a").id, tiny);
    let body = format!(r#"{{"model": "tiny", "prompt": "{}"}}"#, "x".repeat(64));
    let request = parse(body.as_bytes()).expect("is JSON");
    let prepared = prepare(&house.model.served, Endpoint::Text, &request, LIMITS, 1).expect("is good");
    let (tenant, now) = (Tenant::default(), Instant::now());
    let (ticket, place) = house.enter(0).expect("a place");
    let request = &RequestId::generate();
    let terms = WaitTerms { request, tenant: &tenant, arrived: now, deadline: now + WITHIN };
    let refused = house.model.line.admit(&house.placer, ticket, place, prepared, terms).await;
    assert_eq!(refused.err().expect("it is too large").code, ErrorCode::ContextLengthExceeded);
    assert!(house.seat().await.is_ok(), "its seat was given back");
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_with_429_at_its_deadline() {
    let house = house(1, 2);
    let _held = house.seat().await.expect("a seat");
    let began = Instant::now();
    let error = house.seat().await.err().expect("no seat is free");
    assert_eq!((error.code, began.elapsed()), (ErrorCode::QueueFull, WITHIN));
    let (began, soon) = (Instant::now(), Duration::from_secs(1));
    assert!(house.admitted(0, soon).await.is_err());
    assert_eq!(began.elapsed(), soon, "nor past the request's own deadline");
    assert_eq!(house.waiting(), [0; 3]);
    assert!(house.enter(0).is_ok(), "the place in line was given back");
}

#[tokio::test(start_paused = true)]
async fn whoever_leaves_takes_nothing_along() {
    let house = house(1, 8);
    let held = house.seat().await.expect("a seat");
    let mut waits: Vec<_> = (0..3).map(|_| Box::pin(house.seat())).collect();
    for one in &mut waits {
        assert!(futures::poll!(one).is_pending());
    }
    drop(waits.remove(0));
    assert_eq!(house.waiting(), [2; 3]);
    // The next is told to go, and leaves before it hears of it.
    drop(held);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(house.model.line.desk.state.lock().seated, 1);
    drop(waits.remove(0));
    let last = waits.remove(0).await.expect("the seat");
    drop(last);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let state = house.model.line.desk.state.lock();
    assert!(state.seated == 0 && state.queue.is_empty() && !state.attended);
    assert!(house.placer.board.own_work().iter().all(|(_, work)| *work == Default::default()));
}

#[tokio::test(start_paused = true)]
async fn whoever_would_wait_too_long_is_told_at_once_when_to_come_back() {
    let house = Arc::new(house(1, 100));
    let held = house.seat().await.expect("a seat");
    for _ in 0..30 {
        let house = house.clone();
        tokio::spawn(async move {
            let served = house.admitted(0, WITHIN).await?;
            // What each takes.
            tokio::time::sleep(Duration::from_millis(400)).await;
            drop(served);
            Ok::<_, ApiError>(())
        });
    }
    tokio::time::sleep(Duration::from_millis(10)).await;
    drop(held);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let waiting = house.waiting()[0] as f64;
    let began = Instant::now();
    let refused = house.seat().await.err().expect("it would take too long");
    assert_eq!((refused.code, began.elapsed()), (ErrorCode::QueueFull, Duration::ZERO));
    let (told, true_wait) = (refused.retry_after.expect("a time").as_secs_f64(), waiting * 0.4);
    assert!((told / true_wait - 1.0).abs() < 0.25, "{told} s for {true_wait} s");
    assert!(refused.message.contains(&format!("try again in {} s", told.ceil())), "{refused}");
    // Those of another band are not before it.
    let mut first = Box::pin(house.admitted(-1, WITHIN));
    assert!(futures::poll!(&mut first).is_pending());
    first.await.expect("the next seat");
}
