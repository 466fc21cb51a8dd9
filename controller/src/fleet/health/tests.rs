//! Every signal, what follows from it, and what must not follow: groups of instances whose reports are written here.

use baton_proto::{InstanceLoad, Phase, Role, RoleEpoch};
use baton_registry::{HealthRecord, testing::instance_spec};

use super::*;

mod keep;
mod links;
mod times;
mod week;

const BEAT: Duration = Duration::from_secs(1);
/// Instances that a book has room for.
const MOST: usize = 1000;

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn id(name: &str) -> InstanceId {
    InstanceId::new(name).expect("a good id")
}

/// What an instance does in a second.
#[derive(Debug, Clone, Copy, Default)]
struct Work {
    served: u64,
    failed: u64,
    broken: u64,
    handed: u64,
    steps: u64,
    /// Sequences in a step.
    batch: u64,
    step_micros: u64,
    /// It has work, whether or not it does any.
    busy: bool,
}

const IDLE: Work =
    Work { served: 0, failed: 0, broken: 0, handed: 0, steps: 0, batch: 0, step_micros: 0, busy: false };
/// What a prefill instance does in good health, and a decode instance.
const PREFILLS: Work = Work { served: 10, handed: 10, busy: true, ..IDLE };
const DECODES: Work =
    Work { served: 10, handed: 10, steps: 50, batch: 8, step_micros: 20_000, busy: true, ..IDLE };
const WEDGED: Work = Work { busy: true, ..IDLE };

#[derive(Debug, Clone)]
struct Instance {
    spec: InstanceSpec,
    beat: Beat,
    work: Work,
    silent: bool,
}

/// A group that reports every second.
struct Group {
    book: HealthBook,
    began: Instant,
    now: Instant,
    instances: Vec<Instance>,
    /// Looks that said that somebody's quarantine has changed.
    changes: usize,
    /// What the store says, and how often something was written there.
    stored: BTreeMap<InstanceId, HealthRecord>,
    writes: usize,
    /// Of links, not looked at yet.
    link_changes: Vec<LinkChange>,
}

impl Group {
    /// Instances named "p0", "p1", ..., "d0", "d1", ...
    fn new(prefill: usize, decode: usize) -> Self {
        Self::under(HealthConfig::default(), prefill, decode)
    }

    fn under(config: HealthConfig, prefill: usize, decode: usize) -> Self {
        let of = |name: String, role, work| Instance {
            spec: instance_spec(&name, 1),
            beat: Beat {
                role,
                role_epoch: RoleEpoch(1),
                phase: Phase::Ready,
                load_permille: 1000,
                load: InstanceLoad::default(),
            },
            work,
            silent: false,
        };
        let prefills = (0..prefill).map(|number| of(format!("p{number}"), Role::Prefill, PREFILLS));
        let decodes = (0..decode).map(|number| of(format!("d{number}"), Role::Decode, DECODES));
        let now = Instant::now() + secs(1000);
        Self {
            book: HealthBook::new(config, BEAT, MOST),
            began: now,
            now,
            instances: prefills.chain(decodes).collect(),
            changes: 0,
            stored: BTreeMap::new(),
            writes: 0,
            link_changes: Vec::new(),
        }
    }

    fn of(&mut self, name: &str) -> &mut Instance {
        self.instances.iter_mut().find(|instance| instance.spec.id.as_str() == name).expect("an instance")
    }

    fn does(&mut self, name: &str, work: Work) {
        self.of(name).work = work;
    }

    fn second(&mut self) {
        self.now += BEAT;
        for instance in &mut self.instances {
            let Work { served, failed, broken, handed, steps, batch, step_micros, busy } = instance.work;
            let load = &mut instance.beat.load;
            load.running_sequences = u32::from(busy);
            load.failed_requests += failed;
            load.progress += 8 * (served + failed + steps);
            load.decode_steps += steps;
            load.decoded_tokens += steps * batch;
            if step_micros > 0 {
                load.decode_step_micros = step_micros;
            }
            if instance.beat.role == Role::Prefill {
                load.prefilled_requests += served;
                load.finished_transfers_out += handed;
                load.failed_transfers_out += broken;
            } else {
                load.finished_requests += served;
                load.finished_transfers_in += handed;
                load.failed_transfers_in += broken;
            }
            if !instance.silent {
                self.book.observe(self.now, &instance.spec, &instance.beat);
            }
        }
        let looked = self.book.look(self.now);
        self.changes += looked.moved.len();
        self.link_changes.extend(looked.links);
        for id in looked.kept {
            match self.book.record(&id, self.now, self.unix_millis()) {
                Some(record) => drop(self.stored.insert(id, record)),
                None => drop(self.stored.remove(&id)),
            }
            self.writes += 1;
        }
    }

    fn run(&mut self, seconds: u64) {
        (0..seconds).for_each(|_| self.second());
    }

    fn verdict(&self, name: &str) -> Verdict {
        self.book.verdict(&id(name))
    }

    fn quarantined(&self) -> Vec<String> {
        let quarantined = self.book.verdicts().filter(|(_, verdict)| verdict.is_quarantined());
        quarantined.map(|(id, _)| id.to_string()).collect()
    }

    /// Seconds until somebody is quarantined, and for what.
    fn until_quarantine(&mut self, most: u64) -> (u64, String, &'static str) {
        for second in 0..=most {
            for (id, verdict) in self.book.verdicts() {
                if let Verdict::Quarantined { reason, .. } = verdict {
                    return (second, id.to_string(), reason.name());
                }
            }
            self.second();
        }
        panic!("nobody is quarantined within {most} s");
    }
}

#[test]
fn who_is_silent_is_suspected_and_no_more() {
    let mut group = Group::new(2, 2);
    group.run(30);
    group.of("p0").silent = true;
    group.run(2);
    assert_eq!(group.verdict("p0"), Verdict::Healthy);
    group.run(1);
    assert_eq!(group.verdict("p0"), Verdict::Suspect(Reason::Silent(secs(3))));
    group.run(600);
    assert_eq!(group.quarantined(), Vec::<String>::new());
    group.of("p0").silent = false;
    group.run(1);
    assert_eq!((group.verdict("p0"), group.changes), (Verdict::Healthy, 0));
}

#[test]
fn who_has_work_and_does_none_is_wedged() {
    let mut group = Group::new(2, 2);
    group.run(30);
    group.does("d1", WEDGED);
    group.run(7);
    assert_eq!(group.verdict("d1"), Verdict::Healthy);
    group.run(1);
    assert_eq!(group.verdict("d1"), Verdict::Suspect(Reason::Wedged(secs(8))));
    assert_eq!(group.until_quarantine(7), (7, "d1".into(), "wedged"));
    assert_eq!(group.changes, 1);
}

#[test]
fn neither_idleness_nor_waiting_for_others_nor_loading_is_a_wedge() {
    let mut group = Group::new(2, 2);
    group.run(30);
    group.does("p0", IDLE);
    // Its cache has not been offered yet, or is on its way.
    group.does("d0", IDLE);
    group.of("d0").beat.load.waiting_sequences = 5;
    group.of("d0").beat.load.queued_prefill_tokens = 100;
    group.of("d0").beat.load.incoming_transfers = 2;
    group.does("d1", WEDGED);
    group.of("d1").beat.phase = Phase::Loading;
    group.run(600);
    assert_eq!((group.quarantined(), group.verdict("d0")), (Vec::new(), Verdict::Healthy));
    // Nothing holds up its prompt.
    group.of("d0").beat.load.incoming_transfers = 0;
    assert_eq!(group.until_quarantine(15).1, "d0");
}

#[test]
fn a_step_may_take_long_if_its_layers_get_on() {
    let mut group = Group::new(2, 2);
    group.does("p0", WEDGED);
    for _ in 0..60 {
        group.run(10);
        group.of("p0").beat.load.progress += 1;
    }
    assert_eq!(group.quarantined(), Vec::<String>::new());
}

#[test]
fn who_fails_by_its_own_fault_is_quarantined_and_who_fails_seldom_is_not() {
    let mut group = Group::new(2, 2);
    group.does("p0", Work { served: 9, failed: 1, ..PREFILLS });
    group.run(3600);
    assert_eq!(group.verdict("p0"), Verdict::Healthy, "one in ten");
    group.does("p0", Work { served: 2, failed: 3, ..PREFILLS });
    let (after, who, why) = group.until_quarantine(60);
    assert_eq!((who.as_str(), why), ("p0", "failing"));
    assert!((10..45).contains(&after), "after {after} s");
}

#[test]
fn a_single_batch_that_fails_and_what_everybody_fails_at_are_forgiven() {
    let mut group = Group::new(4, 2);
    group.run(120);
    group.does("d0", Work { served: 0, failed: 64, ..DECODES });
    group.run(1);
    group.does("d0", DECODES);
    group.run(60);
    assert_eq!(group.quarantined(), Vec::<String>::new());
    // And if it did nothing else before or after.
    group.does("d1", IDLE);
    group.run(300);
    group.does("d1", Work { served: 0, failed: 64, ..DECODES });
    group.run(1);
    group.does("d1", IDLE);
    group.run(60);
    assert_eq!(group.quarantined(), Vec::<String>::new());
    for name in ["p0", "p1", "p2"] {
        group.does(name, Work { served: 0, failed: 10, ..PREFILLS });
    }
    group.run(600);
    assert_eq!(group.quarantined(), Vec::<String>::new(), "most of them fail: it is what they are asked for");
}

#[test]
fn who_is_much_slower_than_its_peers_is_quarantined() {
    let mut group = Group::new(2, 4);
    group.run(60);
    group.does("d2", Work { step_micros: 70_000, ..DECODES });
    group.run(300);
    assert_eq!(group.verdict("d2"), Verdict::Healthy, "3.5 times as long");
    group.does("d2", Work { step_micros: 100_000, ..DECODES });
    group.run(16);
    assert_eq!(group.verdict("d2"), Verdict::Suspect(Reason::Slow(5.0)));
    assert_eq!(group.until_quarantine(30), (15, "d2".into(), "slow"));
}

#[test]
fn who_only_decodes_beside_prompts_is_not_slow() {
    let mut group = Group::new(2, 4);
    group.run(60);
    // What it says a step takes is of a larger batch; since then every step has computed prompts, too.
    group.of("d2").beat.load.timed_decode_steps = 1;
    group.does("d2", Work { step_micros: 100_000, ..DECODES });
    group.run(600);
    assert_eq!(group.verdict("d2"), Verdict::Healthy);
}

#[test]
fn who_is_slow_for_its_batch_or_for_a_moment_or_among_few_is_not_slow() {
    let larger = Work { step_micros: 150_000, batch: 64, ..DECODES };
    let slow = Work { step_micros: 150_000, ..DECODES };
    let mut group = Group::new(2, 4);
    group.does("d2", larger);
    group.run(600);
    assert_eq!(group.verdict("d2"), Verdict::Healthy, "for its batch");
    for _ in 0..20 {
        group.does("d2", slow);
        group.run(25);
        group.does("d2", DECODES);
        group.run(5);
    }
    // What it said when it last decoded is not how fast it is.
    group.does("d2", slow);
    group.run(5);
    group.does("d2", IDLE);
    group.run(600);
    assert_eq!((group.quarantined(), group.verdict("d2")), (Vec::new(), Verdict::Healthy));
    let mut few = Group::new(2, 3);
    few.does("d2", slow);
    few.run(600);
    assert_eq!(few.quarantined(), Vec::<String>::new(), "two others do not say how long a step takes");
}

/// A link card of `p1` breaks: a quarter of what comes to decode is lost.
#[test]
fn handoffs_that_break_count_against_the_end_at_which_they_do() {
    for (prefill, decode) in [(4, 4), (2, 2), (2, 1), (4, 1)] {
        let mut group = Group::new(prefill, decode);
        group.run(60);
        group.does("p1", Work { handed: 0, broken: 8, ..PREFILLS });
        for number in 0..decode {
            let share = 8 / decode as u64;
            group.does(
                &format!("d{number}"),
                Work { handed: share * (prefill as u64 - 1), broken: share, ..DECODES },
            );
        }
        assert_eq!(group.until_quarantine(120).1, "p1", "{prefill} prefill, {decode} decode");
        group.run(25);
        assert_eq!(group.quarantined(), ["p1"]);
    }
}

#[test]
fn between_two_it_cannot_be_told_which_one_breaks_handoffs() {
    let mut group = Group::new(1, 1);
    group.does("p0", Work { handed: 0, broken: 8, ..PREFILLS });
    group.does("d0", Work { handed: 0, broken: 8, ..DECODES });
    group.run(600);
    assert_eq!(group.quarantined(), Vec::<String>::new());
}

#[test]
fn a_peer_that_dies_takes_nobody_with_it() {
    let mut group = Group::new(1, 2);
    group.run(120);
    // What was on its way is lost at once, and its place stays empty.
    group.of("d0").silent = true;
    group.does("p0", Work { handed: 5, broken: 40, ..PREFILLS });
    group.run(1);
    group.does("p0", PREFILLS);
    group.run(600);
    assert_eq!((group.quarantined(), group.verdict("p0")), (Vec::new(), Verdict::Healthy));
}

#[test]
fn no_more_than_half_of_a_group_is_quarantined() {
    let mut group = Group::new(2, 3);
    group.run(30);
    for name in ["p0", "p1", "d0", "d1", "d2"] {
        group.does(name, WEDGED);
    }
    for _ in 0..600 {
        group.run(1);
        assert!(group.quarantined().len() <= 2, "{:?}", group.quarantined());
    }
    assert_eq!(group.quarantined().len(), 2);
    assert!(matches!(group.verdict("p1"), Verdict::Suspect(Reason::Wedged(_))));
}

#[test]
fn what_nobody_watched_is_held_against_nobody() {
    let mut group = Group::new(2, 4);
    group.does("d0", Work { step_micros: 200_000, ..DECODES });
    group.run(20);
    assert!(matches!(group.verdict("d0"), Verdict::Suspect(Reason::Slow(_))));
    // The controller stands still; the instance recovers, and is slow again when it goes on.
    group.now += secs(40);
    group.run(10);
    assert_eq!(group.verdict("d0"), Verdict::Healthy);
}

#[test]
fn whoever_looks_too_early_changes_nothing() {
    let mut group = Group::new(2, 2);
    assert_eq!(group.book.next_look(), None);
    group.run(10);
    assert_eq!(group.book.next_look(), Some(group.now + BEAT));
    assert_eq!(group.book.look(group.now), Looked::default());
    let off = HealthConfig { enabled: false, ..HealthConfig::default() };
    let mut group = Group::under(off, 2, 2);
    group.does("d0", WEDGED);
    group.run(60);
    assert_eq!((group.book.next_look(), group.verdict("d0")), (None, Verdict::Healthy));
}

#[test]
fn who_is_long_gone_is_forgotten() {
    let mut group = Group::new(2, 2);
    group.run(10);
    group.of("d0").silent = true;
    group.run(1799);
    assert_eq!(group.book.verdicts().count(), 4);
    group.run(1);
    assert_eq!(group.book.verdicts().count(), 3);
}

#[test]
fn no_number_of_new_names_makes_the_book_larger_or_forget_who_is_quarantined() {
    let mut group = Group::new(2, 2);
    group.run(10);
    group.does("d0", WEDGED);
    group.until_quarantine(20);
    group.of("d0").silent = true;
    group.run(2);
    for number in 0..3 * MOST {
        let spec = instance_spec(&format!("x{number}"), 1);
        group.book.observe(group.now + BEAT, &spec, &group.instances[0].beat);
    }
    assert_eq!((group.book.verdicts().count(), group.quarantined()), (MOST, vec!["d0".to_owned()]));
}
