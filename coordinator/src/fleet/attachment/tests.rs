//! An attachment without an instance: what waits for one, and what it is taken to have said.

use std::task::Waker;

use baton_schedule::{
    Settings, Side, Wanted,
    board::{Board, Booking},
    fleet::{
        Role,
        testing::{ready, spec},
    },
};
use futures::{FutureExt, StreamExt};

use super::{standing::standing, task::load_interval_millis, *};
use crate::fleet::{Expected, outbound::Frames, stall::LOOK};

#[test]
fn all_instances_together_are_asked_for_ten_thousand_loads_a_second_at_most() {
    let cases = [(0, 50), (1, 50), (500, 50), (1000, 100), (10_000, 1000), (usize::MAX, 1000)];
    for (instances, millis) in cases {
        assert_eq!(load_interval_millis(instances), millis, "{instances} instances");
    }
}

/// An attachment to an instance that the board knows.
fn up(board: &Arc<Board>) -> (Arc<Attachment>, Frames) {
    let m = spec("m");
    board.list(std::slice::from_ref(&m), Instant::now());
    board.up(&m.id, m.incarnation, ready(Role::Mixed));
    let metrics = baton_process::Metrics::new("coordinator").register(Metrics::register);
    standing(m.id, metrics)
}

struct Sent {
    _guard: LegGuard,
    mailbox: Arc<Mailbox>,
    _booking: Booking,
}

fn send(board: &Arc<Board>, attachment: &Arc<Attachment>) -> Sent {
    let mut booking = board.book(&Wanted::new(10, 10, "r1")).expect("a place");
    let expected = Expected { choices: 1, max_tokens: 10, top_logprobs: None, in_batches: false };
    let mailbox = Arc::new(Mailbox::new(expected));
    let dispatch = v1::Dispatch::default();
    let guard =
        attachment.dispatch(Side::Whole, 1, &mailbox, &mut booking.credit, dispatch).expect("it is up");
    Sent { _guard: guard, mailbox, _booking: booking }
}

fn take_all(frames: &mut Frames) -> Vec<Ask> {
    std::iter::from_fn(|| frames.next().now_or_never().flatten()?.frame).collect()
}

#[tokio::test(start_paused = true)]
async fn clients_that_all_leave_at_once_take_nobody_with_them() {
    let board = Board::new(Duration::from_secs(60), Settings::APART);
    let (attachment, mut frames) = up(&board);
    let mut sent = Vec::new();
    for _ in 0..2100 {
        sent.push(send(&board, &attachment));
        take_all(&mut frames);
    }
    let stay = sent.split_off(2000);
    drop(sent);
    assert!(!attachment.is_deaf());
    for (leg, Sent { mailbox, .. }) in (2001..).zip(&stay) {
        let output = v1::LegOutput { leg, tokens: vec![7], ..Default::default() };
        attachment.deliver(v1::StepOutput { legs: vec![output] });
        let mut got = Default::default();
        mailbox.take(Waker::noop(), &mut got);
        assert_eq!(got.len(), 1, "leg {leg}");
        assert!(attachment.is_up());
    }
    let cancels = take_all(&mut frames);
    assert_eq!(cancels.len(), 2000);
    assert!(cancels.iter().all(|frame| matches!(frame, Ask::Cancel(_))));
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_reads_nothing_for_long_is_deaf() {
    let board = Board::new(Duration::from_secs(60), Settings::APART);
    let (attachment, mut frames) = up(&board);
    take_all(&mut frames);
    tokio::time::advance(10 * UNREAD_MOST).await;
    assert!(!attachment.is_deaf(), "there was nothing to read");
    let sent = send(&board, &attachment);
    tokio::time::advance(UNREAD_MOST).await;
    assert!(!attachment.is_deaf());
    drop(sent);
    tokio::time::advance(LOOK).await;
    assert!(attachment.is_deaf());
    take_all(&mut frames);
    assert!(!attachment.is_deaf());
}

#[tokio::test(start_paused = true)]
async fn an_instance_is_told_why_a_leg_is_dropped() {
    let board = Board::new(Duration::from_secs(60), Settings::APART);
    let (attachment, mut frames) = up(&board);
    let reasons = |frames: &mut Frames| -> Vec<String> {
        let reason = |frame| if let Ask::Cancel(cancel) = frame { Some(cancel.reason) } else { None };
        take_all(frames).into_iter().filter_map(reason).collect()
    };
    drop(send(&board, &attachment));
    assert_eq!(reasons(&mut frames), ["client_gone"]);
    let sent = send(&board, &attachment);
    let bug = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _sent = sent;
        panic!("as the test wants it");
    }));
    assert!(bug.is_err());
    assert_eq!(reasons(&mut frames), ["bug"]);
}

#[tokio::test(start_paused = true)]
async fn legs_that_are_taken_from_a_stuck_instance_are_counted_with_what_is_cancelled() {
    let board = Board::new(Duration::from_secs(60), Settings::APART);
    let (attachment, mut frames) = up(&board);
    let sent = [send(&board, &attachment), send(&board, &attachment)];
    take_all(&mut frames);
    assert_eq!(attachment.give_up(), (2, Some(LegId(2))));
    let told = take_all(&mut frames);
    let stuck = |frame: &Ask| matches!(frame, Ask::Cancel(cancel) if cancel.reason == "stuck");
    assert!(told.len() == 2 && told.iter().all(stuck), "{told:?}");
    let of = |why: CancelReason| {
        attachment.metrics.cancels.get_or_create(&crate::metrics::reason(why.name())).get()
    };
    assert_eq!(of(CancelReason::Stuck), 2);
    drop(sent);
    assert_eq!(of(CancelReason::ClientGone), 0, "nothing is left to cancel");
}
