//! What waits to be sent on the stream to one instance: dispatches and cancels, in the order in which they were made, so
//! that no cancel arrives before what it cancels.
//!
//! Filled by [`super::attachment`], emptied by the stream. Dispatches: [`DISPATCHES_MOST`] at a time, more are refused. Cancels
//! always find room, for a burst of them is nobody's fault: there is one for each choice of a dispatched leg, at most, so
//! that they are bounded by the legs that are open. An instance that reads nothing though something waits is told by
//! [`Outbound::unread_for`].

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use baton_proto::v1;
use futures::Stream;
use parking_lot::Mutex;
use tokio::time::Instant;
use v1::attach_request::Frame;

/// Dispatches that may wait.
pub(super) const DISPATCHES_MOST: usize = 1024;

#[derive(Debug)]
struct State {
    frames: VecDeque<Frame>,
    /// How many of them are dispatches.
    dispatches: usize,
    /// When one was taken last, or came to an empty queue.
    moved: Instant,
    /// Nobody puts anything in any more.
    closed: bool,
    reader: Option<Waker>,
}

/// Closes the queue when it is dropped.
#[derive(Debug)]
pub(super) struct Outbound {
    state: Arc<Mutex<State>>,
}

/// The other end of it: what the stream sends.
#[derive(Debug)]
pub(crate) struct Frames {
    state: Arc<Mutex<State>>,
}

impl Outbound {
    /// A queue that holds a greeting.
    pub(super) fn new(hello: v1::attach_request::Hello) -> (Self, Frames) {
        let state = State {
            frames: VecDeque::from([Frame::Hello(hello)]),
            dispatches: 0,
            moved: Instant::now(),
            closed: false,
            reader: None,
        };
        let state = Arc::new(Mutex::new(state));
        (Self { state: state.clone() }, Frames { state })
    }

    /// Whether a dispatch finds room.
    pub(super) fn has_room(&self) -> bool {
        self.state.lock().dispatches < DISPATCHES_MOST
    }

    /// Puts a frame behind those that wait.
    pub(super) fn push(&self, frame: Frame) {
        let mut state = self.state.lock();
        if state.frames.is_empty() {
            state.moved = Instant::now();
        }
        state.dispatches += usize::from(matches!(frame, Frame::Dispatch(_)));
        state.frames.push_back(frame);
        let reader = state.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// For how long something has waited and nothing been read.
    pub(super) fn unread_for(&self, now: Instant) -> Duration {
        let state = self.state.lock();
        if state.frames.is_empty() { Duration::ZERO } else { now.saturating_duration_since(state.moved) }
    }
}

impl Drop for Outbound {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        state.closed = true;
        let reader = state.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
    }
}

impl Stream for Frames {
    type Item = v1::AttachRequest;

    /// Ends, once the queue is closed, with the last frame.
    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.state.lock();
        match state.frames.pop_front() {
            Some(frame) => {
                state.dispatches -= usize::from(matches!(frame, Frame::Dispatch(_)));
                state.moved = Instant::now();
                Poll::Ready(Some(v1::AttachRequest { frame: Some(frame) }))
            }
            None if state.closed => Poll::Ready(None),
            None => {
                state.reader = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, StreamExt};

    use super::*;

    fn dispatch(leg: u64) -> Frame {
        Frame::Dispatch(v1::Dispatch { leg, ..Default::default() })
    }

    fn cancel(leg: u64) -> Frame {
        Frame::Cancel(v1::Cancel { leg, ..Default::default() })
    }

    fn next(frames: &mut Frames) -> Option<Frame> {
        frames.next().now_or_never().flatten().and_then(|request| request.frame)
    }

    #[tokio::test(start_paused = true)]
    async fn cancels_keep_their_place_and_always_find_one() {
        let (outbound, mut frames) = Outbound::new(v1::attach_request::Hello::default());
        assert!(matches!(next(&mut frames), Some(Frame::Hello(_))));
        (0..DISPATCHES_MOST as u64).for_each(|leg| outbound.push(dispatch(leg)));
        assert!(!outbound.has_room());
        (0..5000).for_each(|leg| outbound.push(cancel(leg)));
        assert_eq!(next(&mut frames), Some(dispatch(0)));
        assert!(outbound.has_room());
        outbound.push(dispatch(7000));
        drop(outbound);
        let rest: Vec<_> =
            frames.by_ref().map(|request| request.frame).collect().now_or_never().expect("it ends");
        let expected = (1..DISPATCHES_MOST as u64).map(dispatch).chain((0..5000).map(cancel));
        let expected: Vec<_> = expected.chain([dispatch(7000)]).map(Some).collect();
        assert!(rest == expected, "something is lost or out of order");
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_nothing_to_read_is_not_taken_to_be_deaf() {
        let second = Duration::from_secs(1);
        let (outbound, mut frames) = Outbound::new(v1::attach_request::Hello::default());
        let unread = |outbound: &Outbound| outbound.unread_for(Instant::now());
        tokio::time::advance(second).await;
        assert_eq!(unread(&outbound), second);
        next(&mut frames);
        tokio::time::advance(10 * second).await;
        assert_eq!(unread(&outbound), Duration::ZERO);
        outbound.push(cancel(1));
        outbound.push(cancel(2));
        tokio::time::advance(second).await;
        assert_eq!(unread(&outbound), second);
        next(&mut frames);
        assert_eq!(unread(&outbound), Duration::ZERO, "it reads");
        tokio::time::advance(second).await;
        outbound.push(cancel(3));
        assert_eq!(unread(&outbound), second);
    }
}
