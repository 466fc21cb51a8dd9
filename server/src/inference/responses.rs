//! What is sent on one coordinator's stream, and when.
//!
//! First the welcome, then a load at once, and from then on whatever waits in the outbox, as soon as it does; loads as
//! often as the coordinator asked for, and only when they have changed, but one a second at least. A load follows what
//! its legs had said by then, and nothing that came later goes before it: see [`Outbox`].

use std::{collections::VecDeque, pin::Pin, sync::Arc, time::Duration};

use baton_proto::v1;
use futures::{Stream, StreamExt, stream};
use tokio::{
    sync::watch,
    time::{Instant, Sleep, sleep_until},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Status;
use v1::attach_response::Frame;

use super::outbox::{Outbox, Report, Want};
use crate::{
    engine::{
        load::Load,
        sequence::{LegEnd, LegUpdate},
    },
    role::RoleView,
};

/// How often the load is told to whoever does not say.
const INTERVAL_USUAL: Duration = Duration::from_millis(500);
/// No coordinator is told it more often.
const INTERVAL_LEAST: Duration = Duration::from_millis(20);
/// Nor more seldom, whether it has changed or not: who hears nothing for longer may take the instance for frozen.
const INTERVAL_MOST: Duration = Duration::from_secs(1);

/// Largest step in one frame, unless one leg's alone is larger: a quarter of what coordinators take. Only what was merged while
/// nobody read comes near it.
const STEP_BYTES_MOST: usize = 4 << 20;

pub(super) type AttachStream =
    std::pin::Pin<Box<dyn Stream<Item = Result<v1::AttachResponse, Status>> + Send>>;

/// How often a coordinator is told the load that wishes for it every so many milliseconds.
pub(super) fn load_interval(wished_millis: u32) -> Duration {
    match wished_millis {
        0 => INTERVAL_USUAL,
        wished => Duration::from_millis(wished.into()).clamp(INTERVAL_LEAST, INTERVAL_MOST),
    }
}

/// Everything a stream needs from one frame to the next.
pub(super) struct Responses {
    outbox: Arc<Outbox>,
    role: watch::Receiver<RoleView>,
    load: watch::Receiver<Load>,
    /// Between two loads, at least.
    interval: Duration,
    /// When the last load was sent, or put behind what is sent before it.
    told_load: Option<Instant>,
    /// Taken from the outbox, and more than one frame may hold.
    rest: VecDeque<LegUpdate>,
    /// Follows that.
    held: Option<Report>,
    /// For what is due later; set anew when that changes, which is once a load, and not with each frame.
    timer: Pin<Box<Sleep>>,
    ended: CancellationToken,
    _ends_the_reader: DropGuard,
}

impl Responses {
    pub(super) fn new(
        outbox: Arc<Outbox>,
        role: watch::Receiver<RoleView>,
        load: watch::Receiver<Load>,
        interval: Duration,
        ended: CancellationToken,
    ) -> Self {
        let ends_the_reader = ended.clone().drop_guard();
        Self {
            outbox,
            role,
            load,
            interval,
            told_load: None,
            rest: VecDeque::new(),
            held: None,
            timer: Box::pin(sleep_until(Instant::now())),
            ended,
            _ends_the_reader: ends_the_reader,
        }
    }

    /// The stream: the welcome, then what there is to say until it ends.
    pub(super) fn after(self, welcome: v1::attach_response::Welcome) -> AttachStream {
        let rest = stream::unfold(self, |mut responses| async {
            let frame = responses.next().await?;
            Some((frame, responses))
        });
        let first = stream::iter([Frame::Welcome(welcome)]);
        first.chain(rest).map(|frame| Ok(v1::AttachResponse { frame: Some(frame) })).boxed()
    }

    async fn next(&mut self) -> Option<Frame> {
        if let Some(step) = self.next_step() {
            return Some(step);
        }
        if let Some(report) = self.held.take() {
            return Some(self.load_of(report));
        }
        loop {
            let (want, until) = self.due(Instant::now());
            if let Some(until) = until
                && self.timer.deadline() != until
            {
                self.timer.as_mut().reset(until);
            }
            tokio::select! {
                biased;
                () = self.ended.cancelled() => {
                    // The instance may be stopping, and these the last ends of its legs.
                    self.rest = self.outbox.take_now(Want::Updates).0.into();
                    return self.next_step();
                }
                Ok(()) = self.role.changed() => {
                    return Some(Frame::Role((*self.role.borrow_and_update()).into()));
                }
                (updates, report) = self.outbox.take(want) => {
                    if report.is_some() {
                        self.told_load = Some(Instant::now());
                    }
                    match report {
                        Some(report) if updates.is_empty() => return Some(self.load_of(report)),
                        report => self.held = report,
                    }
                    self.rest = updates.into();
                    return self.next_step();
                }
                () = &mut self.timer, if until.is_some() => {}
            }
        }
    }

    /// As much of the rest as one frame may hold.
    fn next_step(&mut self) -> Option<Frame> {
        let mut bytes = 0;
        let fits = |update: &&LegUpdate| {
            bytes += bytes_of(update);
            bytes <= STEP_BYTES_MOST
        };
        let count = self.rest.iter().take_while(fits).count().max(1).min(self.rest.len());
        let legs: Vec<_> = self.rest.drain(..count).map(v1::LegOutput::from).collect();
        (!legs.is_empty()).then_some(Frame::Step(v1::StepOutput { legs }))
    }

    /// What is to be sent now, and from when on it is more.
    fn due(&self, now: Instant) -> (Want, Option<Instant>) {
        let Some(told) = self.told_load else { return (Want::Report, None) };
        let (soon, late) = (told + self.interval, told + INTERVAL_MOST);
        if now >= late {
            (Want::Report, None)
        } else if now >= soon {
            (Want::News, Some(late))
        } else {
            (Want::Updates, Some(soon))
        }
    }

    fn load_of(&self, report: Report) -> Frame {
        let mut load = v1::InstanceLoad::from(&report.load);
        load.seen_leg = Some(report.seen_leg.0);
        // It is counted in the midst of a step, of which nothing else is known yet.
        load.progress = self.load.borrow().done.progress;
        Frame::Load(load)
    }
}

/// At most, on the wire.
fn bytes_of(update: &LegUpdate) -> usize {
    const HEAD: usize = 64;
    const TOKEN: usize = 5;
    const LOGPROBS: usize = 16;
    const TOP: usize = 9;
    let logprobs = update.logprobs.iter().map(|scored| LOGPROBS + TOP * scored.top.len());
    let error = match &update.end {
        Some(LegEnd::Failed(error)) => error.message.len(),
        Some(LegEnd::Finished { .. }) | None => 0,
    };
    HEAD + TOKEN * update.tokens.len() + logprobs.sum::<usize>() + error
}

#[cfg(test)]
mod tests {
    use baton_proto::{LegId, RoleEpoch};
    use prost::Message;

    use super::*;
    use crate::{
        engine::{sampler::logprobs::TokenLogprobs, scheduler::Occupancy},
        role::{Phase, Role},
    };

    struct Script {
        outbox: Arc<Outbox>,
        responses: Responses,
        began: Instant,
        _role: watch::Sender<RoleView>,
        load: watch::Sender<Load>,
    }

    impl Script {
        fn begin(wished_millis: u32) -> Self {
            let (role, phase, epoch) = (Role::Mixed, Phase::Ready, RoleEpoch(1));
            let view = RoleView { role, epoch, phase, load_permille: 1000, cordoned: false };
            let (role, seen) = watch::channel(view);
            let (load, shown) = watch::channel(Load::default());
            let outbox = Arc::new(Outbox::new(Load::default()));
            let (interval, ended) = (load_interval(wished_millis), CancellationToken::new());
            let responses = Responses::new(outbox.clone(), seen, shown, interval, ended);
            Self { outbox, responses, began: Instant::now(), _role: role, load }
        }

        /// The engine says that so many run, and a token of each of these legs.
        fn tell(&self, running: u32, legs: &[u64]) {
            let update = |&leg: &u64| LegUpdate {
                leg: LegId(leg),
                choice: 0,
                first_position: 0,
                tokens: vec![1],
                logprobs: Vec::new(),
                cached_tokens: None,
                end: None,
            };
            let load = Load { occupancy: Occupancy { running, ..Occupancy::default() }, ..Load::default() };
            self.outbox.tell(legs.iter().map(update).collect(), Report { load, seen_leg: LegId(9) });
        }

        /// The next frame, and after how many milliseconds it came: "3 run", or "legs 1 2".
        async fn next(&mut self) -> (u128, String) {
            let frame = self.responses.next().await.expect("a frame");
            let what = match frame {
                Frame::Load(load) => format!("{} run", load.running_sequences),
                Frame::Step(step) => {
                    let legs: Vec<_> = step.legs.iter().map(|leg| leg.leg.to_string()).collect();
                    format!("legs {}", legs.join(" "))
                }
                other => panic!("{other:?}"),
            };
            (self.began.elapsed().as_millis(), what)
        }
    }

    fn at(millis: u128, what: &str) -> (u128, String) {
        (millis, what.to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn loads_come_when_they_have_changed_and_no_more_often_than_was_asked() {
        let mut script = Script::begin(50);
        assert_eq!(script.next().await, at(0, "0 run"), "the first comes at once");
        script.tell(1, &[]);
        script.tell(2, &[]);
        assert_eq!(script.next().await, at(50, "2 run"));
        assert_eq!(script.next().await, at(1050, "2 run"), "one a second, changed or not");
        tokio::time::sleep(Duration::from_millis(200)).await;
        script.tell(3, &[]);
        assert_eq!(script.next().await, at(1250, "3 run"), "at once after a pause");
    }

    #[tokio::test(start_paused = true)]
    async fn a_load_follows_what_led_to_it_and_is_not_held_up_by_tokens() {
        let mut script = Script::begin(50);
        script.tell(1, &[1]);
        assert_eq!(script.next().await, at(0, "legs 1"));
        assert_eq!(script.next().await, at(0, "1 run"));
        for step in 0..10 {
            script.tell(step, &[1, 2]);
            assert_eq!(script.next().await.1, "legs 1 2");
            if step == 5 {
                assert_eq!(script.next().await, at(50, "5 run"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_gathered_while_nobody_read_comes_in_frames_that_are_taken() {
        let mut script = Script::begin(50);
        assert_eq!(script.next().await, at(0, "0 run"));
        let scored = TokenLogprobs { logprob: -0.5, top: vec![(u32::MAX, -0.5); 20] };
        let update = |leg: u64| LegUpdate {
            leg: LegId(leg),
            choice: 0,
            first_position: 0,
            tokens: vec![u32::MAX; 2_000],
            logprobs: vec![scored.clone(); 2_000],
            cached_tokens: None,
            end: None,
        };
        let load = Load { occupancy: Occupancy { running: 3, ..Occupancy::default() }, ..Load::default() };
        tokio::time::sleep(Duration::from_millis(50)).await;
        script.outbox.tell((0..40).map(update).collect(), Report { load, seen_leg: LegId(9) });
        let (mut legs, mut frames) = (Vec::new(), 0);
        loop {
            match script.responses.next().await.expect("a frame") {
                Frame::Step(step) => {
                    assert!(step.encoded_len() <= STEP_BYTES_MOST);
                    assert!(step.encoded_len() > STEP_BYTES_MOST / 2 || legs.len() + step.legs.len() == 40);
                    frames += 1;
                    legs.extend(step.legs.iter().map(|leg| leg.leg));
                }
                Frame::Load(load) => break assert_eq!(load.running_sequences, 3),
                other => panic!("{other:?}"),
            }
        }
        assert!(legs.iter().copied().eq(0..40), "{legs:?}");
        assert!(frames > 2);
        script.tell(4, &[7]);
        script.responses.ended.cancel();
        assert_eq!(script.next().await.1, "legs 7");
        assert!(script.responses.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn progress_is_told_as_it_is_in_the_midst_of_a_step() {
        let mut script = Script::begin(1000);
        script.next().await;
        script.load.send_if_modified(|load| {
            load.done.progress = 7;
            false
        });
        match script.responses.next().await {
            Some(Frame::Load(load)) => assert_eq!((load.progress, load.seen_leg), (7, Some(0))),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn wishes_are_kept_within_bounds() {
        let cases = [(0, 500), (1, 20), (50, 50), (1000, 1000), (60_000, 1000)];
        for (wished, given) in cases {
            assert_eq!(load_interval(wished).as_millis(), given, "{wished}");
        }
    }
}
