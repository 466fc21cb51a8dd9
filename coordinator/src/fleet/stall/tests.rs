//! Loads as an instance may tell them, and when they show that it is stuck.

use super::*;

const LEAST: Duration = Duration::from_secs(3);

/// A stall and the time it is asked at.
struct Rig {
    stall: Stall,
    now: Instant,
    unseen: Option<Instant>,
    /// When it was told to be stuck, since the start.
    stuck: Vec<Duration>,
    began: Instant,
}

fn load(progress: u64, running: u32) -> v1::InstanceLoad {
    v1::InstanceLoad { progress, running_sequences: running, seen_leg: Some(0), ..Default::default() }
}

impl Rig {
    fn new() -> Self {
        let now = Instant::now();
        Self { stall: Stall::new(LEAST, now), now, unseen: None, stuck: Vec::new(), began: now }
    }

    /// For so long it says `says` every so often, if anything.
    fn pass(&mut self, time: Duration, says: impl Fn(Duration) -> Option<v1::InstanceLoad>) -> Vec<Verdict> {
        let (began, mut verdicts) = (self.now, Vec::new());
        while self.now < began + time {
            self.now += LOOK;
            if let Some(load) = says(self.now - began) {
                self.stall.load(&load, self.now);
            }
            let verdict = self.stall.look(self.unseen, self.now);
            if matches!(verdict, Verdict::Stuck(_)) {
                self.stuck.push(self.now - self.began);
            }
            verdicts.push(verdict);
        }
        verdicts
    }
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn who_has_work_and_computes_nothing_is_stuck_after_three_seconds() {
    let mut rig = Rig::new();
    rig.pass(seconds(5), |at| Some(load(at.as_millis() as u64, 1)));
    assert_eq!(rig.stuck, []);
    let verdicts = rig.pass(seconds(6), |_| Some(load(5_000, 1)));
    assert_eq!(rig.stuck, [seconds(5) + LEAST + LOOK], "it is told once, while nothing more is sent there");
    assert_eq!(*verdicts.last().expect("looked"), Verdict::StillStuck);
    // What was placed there for want of others goes on elsewhere in its turn.
    rig.pass(seconds(1), |_| Some(load(5_000, 1)));
    assert_eq!(rig.stuck.len(), 2);
    assert_eq!(rig.pass(LOOK, |_| Some(load(5_001, 1))), [Verdict::Well]);
}

#[test]
fn who_has_nothing_to_do_or_waits_for_others_is_not() {
    let waits = v1::InstanceLoad { waiting_sequences: 3, incoming_transfers: 1, ..load(7, 0) };
    let blocked = v1::InstanceLoad { queued_prefill_tokens: 900, outgoing_transfers: 1, ..load(7, 0) };
    for idle in [load(7, 0), waits, blocked] {
        let mut rig = Rig::new();
        rig.pass(seconds(60), |_| Some(idle));
        assert_eq!(rig.stuck, [], "{idle:?}");
        // Its time begins when it has work.
        rig.pass(seconds(2), |_| Some(load(7, 1)));
        assert_eq!(rig.stuck, [], "{idle:?}");
    }
    let mut rig = Rig::new();
    let queued = v1::InstanceLoad { queued_prefill_tokens: 900, ..load(7, 0) };
    rig.pass(seconds(4), |_| Some(queued));
    assert_eq!(rig.stuck.len(), 1, "nothing hinders it");
}

#[test]
fn who_gets_on_slowly_is_never_stuck() {
    // A layer takes 2.9 seconds, and loads come once a second.
    let mut rig = Rig::new();
    let each_second = |at: Duration| at.subsec_millis() == 0;
    rig.pass(seconds(120), |at| each_second(at).then(|| load(at.as_millis() as u64 / 2_900, 1)));
    assert_eq!(rig.stuck, []);
    // The steps that it has measured take 2 seconds: it gets 16.
    let mut rig = Rig::new();
    let slow = |progress| v1::InstanceLoad { decode_step_micros: 2_000_000, ..load(progress, 1) };
    rig.pass(seconds(15), |_| Some(slow(7)));
    assert_eq!(rig.stuck, []);
    rig.pass(seconds(3), |_| Some(slow(7)));
    assert_eq!(rig.stuck.len(), 1);
}

#[test]
fn who_was_taken_to_be_stuck_and_got_on_is_given_longer() {
    let mut rig = Rig::new();
    // Of layers that take 5 seconds.
    rig.pass(seconds(120), |at| Some(load(at.as_secs() / 5, 1)));
    assert_eq!(rig.stuck, [LEAST + 2 * LOOK], "only the first was thought to be too long");
    rig.pass(seconds(35), |_| Some(load(24, 1)));
    assert_eq!(rig.stuck.len(), 2, "but not for ever: {:?}", rig.stuck);
}

#[test]
fn output_is_a_sign_of_life_too() {
    let mut rig = Rig::new();
    for _ in 0..20 {
        rig.pass(seconds(1), |_| Some(load(7, 1)));
        rig.stall.output(rig.now);
    }
    assert_eq!(rig.stuck, []);
}

#[test]
fn an_engine_that_takes_nothing_in_is_stuck() {
    let mut rig = Rig::new();
    rig.pass(seconds(20), |_| Some(load(7, 0)));
    rig.unseen = Some(rig.now);
    rig.pass(LEAST, |_| Some(load(7, 0)));
    assert_eq!(rig.stuck, []);
    rig.pass(LOOK, |_| Some(load(7, 0)));
    assert_eq!(rig.stuck.len(), 1);
    // One whose step takes long looks at what has come after it.
    let mut rig = Rig::new();
    rig.unseen = Some(rig.now);
    rig.pass(seconds(60), |at| Some(load(at.as_millis() as u64 / 500, 0)));
    assert_eq!(rig.stuck, []);
}

#[test]
fn who_says_nothing_is_asked_and_stuck_if_it_does_not_answer() {
    let mut rig = Rig::new();
    rig.pass(seconds(1), |_| Some(load(7, 0)));
    let verdicts = rig.pass(seconds(8), |_| None);
    assert_eq!(verdicts.iter().filter(|verdict| **verdict == Verdict::Ask).count(), 1);
    assert_eq!(verdicts.iter().position(|verdict| *verdict == Verdict::Ask), Some(7), "after two seconds");
    assert_eq!(rig.stuck, [seconds(1) + LEAST + LOOK, seconds(1) + 2 * LEAST + LOOK]);
    assert_eq!(rig.pass(LOOK, |_| Some(load(7, 0))), [Verdict::Well]);

    let mut rig = Rig::new();
    for _ in 0..10 {
        let verdicts = rig.pass(seconds(2), |_| None);
        assert_eq!(*verdicts.last().expect("looked"), Verdict::Ask);
        rig.stall.heard(rig.now);
    }
    assert_eq!(rig.stuck, [], "it has answered each time");
}

#[test]
fn one_of_an_earlier_version_is_judged_by_its_silence_alone() {
    let mut rig = Rig::new();
    rig.unseen = Some(rig.now);
    rig.pass(seconds(60), |_| Some(v1::InstanceLoad { seen_leg: None, ..load(0, 1) }));
    assert_eq!(rig.stuck, []);
    rig.pass(seconds(4), |_| None);
    assert_eq!(rig.stuck.len(), 1);
}

#[test]
fn who_was_held_up_itself_blames_nobody() {
    for says in [Some(load(7, 1)), None] {
        let mut rig = Rig::new();
        rig.pass(seconds(2), |_| says);
        rig.now += seconds(30);
        assert_eq!(rig.stall.look(None, rig.now), Verdict::Well);
        rig.pass(seconds(2) - LOOK, |_| says);
        assert_eq!(rig.stuck, []);
        rig.pass(seconds(2), |_| says);
        assert_eq!(rig.stuck.len(), 1, "from then on it counts");
    }
}

#[test]
fn who_took_nothing_in_is_stuck_until_it_does_though_nothing_waits_for_it_any_more() {
    let idle = |seen: u64| v1::InstanceLoad { seen_leg: Some(seen), ..load(7, 0) };
    let stuck = || {
        let mut rig = Rig::new();
        rig.pass(seconds(1), |_| Some(idle(4)));
        let sent = rig.now;
        rig.unseen = Some(sent);
        rig.pass(LEAST + LOOK, |_| Some(idle(4)));
        assert_eq!(rig.stuck.len(), 1);
        // Its legs go elsewhere.
        rig.stall.gave_up(LegId(6), Some(sent));
        rig.unseen = None;
        let verdicts = rig.pass(seconds(20), |_| Some(idle(5)));
        assert!(!verdicts.contains(&Verdict::Well), "it has not seen the last");
        rig
    };
    assert_eq!(stuck().pass(LOOK, |_| Some(idle(6))), [Verdict::Well]);
    assert_eq!(stuck().pass(LOOK, |_| Some(v1::InstanceLoad { progress: 8, ..idle(5) })), [Verdict::Well]);
    let mut rig = stuck();
    rig.stall.output(rig.now);
    assert_eq!(rig.pass(LOOK, |_| Some(idle(5))), [Verdict::Well]);
}
