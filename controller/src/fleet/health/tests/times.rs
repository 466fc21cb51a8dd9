//! How long quarantines take, what probation does, and what is remembered.

use proptest::prelude::*;

use super::*;

/// Until when, and for the how manieth time, an instance is quarantined.
pub(super) fn sentence(group: &Group, name: &str) -> (u64, u32) {
    match group.verdict(name) {
        Verdict::Quarantined { until, times, .. } => {
            (until.saturating_duration_since(group.now).as_secs(), times)
        }
        other => panic!("{other:?}"),
    }
}

pub(super) fn until(group: &mut Group, most: u64, name: &str, verdict: fn(&Verdict) -> bool) -> u64 {
    for second in 0..=most {
        if verdict(&group.verdict(name)) {
            return second;
        }
        group.second();
    }
    panic!("{name} is {:?} after {most} s", group.verdict(name));
}

pub(super) fn is_probation(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Probation { .. })
}

#[test]
fn each_quarantine_is_twice_as_long_as_the_one_before_up_to_the_most() {
    let mut group = Group::new(2, 2);
    group.run(10);
    group.does("d0", WEDGED);
    group.until_quarantine(20);
    let mut lengths = vec![sentence(&group, "d0").0];
    // It stays wedged: its probation does not last a moment.
    for times in 2..=9 {
        group.run(*lengths.last().expect("one"));
        let (length, count) = sentence(&group, "d0");
        assert_eq!(count, times);
        lengths.push(length);
    }
    assert_eq!(lengths, [30, 60, 120, 240, 480, 960, 1800, 1800, 1800]);
}

#[test]
fn who_does_well_on_probation_is_back_for_good() {
    let mut group = Group::new(2, 2);
    group.run(10);
    group.does("d0", WEDGED);
    group.until_quarantine(20);
    group.does("d0", DECODES);
    assert_eq!(until(&mut group, 40, "d0", is_probation), 30);
    assert_eq!(group.changes, 2, "into it and out of it");
    assert_eq!(until(&mut group, 130, "d0", |verdict| *verdict == Verdict::Healthy), 120);
    group.run(600);
    assert_eq!((group.verdict("d0"), group.changes), (Verdict::Healthy, 2));
}

#[test]
fn on_probation_a_suspicion_is_enough() {
    let mut group = Group::new(2, 4);
    group.run(10);
    let slow = Work { step_micros: 200_000, ..DECODES };
    group.does("d0", slow);
    group.until_quarantine(40);
    // Out of service it does nothing.
    group.does("d0", IDLE);
    until(&mut group, 40, "d0", is_probation);
    group.does("d0", slow);
    assert_eq!(group.until_quarantine(40).0, 16, "half of what it takes at first");
    assert_eq!(sentence(&group, "d0"), (60, 2));
}

#[test]
fn what_failed_before_a_quarantine_does_not_count_after_it() {
    let mut group = Group::new(2, 2);
    group.does("p0", Work { served: 0, failed: 50, ..PREFILLS });
    group.until_quarantine(20);
    group.does("p0", PREFILLS);
    until(&mut group, 30, "p0", is_probation);
    group.run(200);
    assert_eq!(group.verdict("p0"), Verdict::Healthy);
}

#[test]
fn good_health_of_half_an_hour_clears_the_record_and_less_does_not() {
    let relapse_after = |seconds: u64| {
        let mut group = Group::new(2, 2);
        group.run(10);
        group.does("d0", WEDGED);
        group.until_quarantine(20);
        group.does("d0", DECODES);
        // Quarantine and probation, then good health.
        group.run(150 + seconds);
        assert_eq!(group.verdict("d0"), Verdict::Healthy);
        group.does("d0", WEDGED);
        group.until_quarantine(20);
        sentence(&group, "d0")
    };
    assert_eq!(relapse_after(1780), (60, 2));
    assert_eq!(relapse_after(1801), (30, 1));
}

#[test]
fn a_restart_begins_its_counts_anew_and_keeps_its_quarantine() {
    let mut group = Group::new(2, 2);
    group.run(10);
    group.does("p0", Work { served: 0, failed: 50, ..PREFILLS });
    group.until_quarantine(20);
    let restart = |group: &mut Group| {
        let instance = group.of("p0");
        instance.spec.incarnation.0 += 1;
        instance.beat.load = InstanceLoad::default();
        instance.work = PREFILLS;
    };
    let before = group.verdict("p0");
    group.run(10);
    restart(&mut group);
    group.run(5);
    assert_eq!(group.verdict("p0"), before);
    until(&mut group, 30, "p0", is_probation);
    group.run(200);
    group.does("p0", WEDGED);
    group.until_quarantine(20);
    assert_eq!(sentence(&group, "p0"), (60, 2), "the process is another one, the instance is not");
    // The other way round: what an earlier process failed at is not the next one's.
    let mut group = Group::new(2, 2);
    group.does("p0", Work { served: 0, failed: 50, ..PREFILLS });
    group.run(8);
    restart(&mut group);
    group.run(120);
    assert_eq!(group.verdict("p0"), Verdict::Healthy);
}

/// What an instance does for some seconds.
pub(super) fn spell() -> impl Strategy<Value = (usize, Work, bool, u64)> {
    let work = prop_oneof![
        Just(IDLE),
        Just(DECODES),
        Just(WEDGED),
        Just(Work { served: 1, failed: 9, ..DECODES }),
        Just(Work { handed: 1, broken: 9, ..DECODES }),
        Just(Work { step_micros: 500_000, ..DECODES }),
    ];
    (0usize..6, work, prop::bool::weighted(0.1), 1u64..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever instances do: a quarantine is left only when its time is over and only for a probation; each ends later
    /// than the one before; times grow by one; and a look is never due in the past.
    #[test]
    fn verdicts_move_forward(spells in prop::collection::vec(spell(), 1..40)) {
        let mut group = Group::new(2, 4);
        let mut last_until = BTreeMap::new();
        for (who, work, silent, seconds) in spells {
            let instance = &mut group.instances[who];
            (instance.work, instance.silent) = (work, silent);
            for _ in 0..seconds {
                let before: BTreeMap<_, _> =
                    group.book.verdicts().map(|(id, verdict)| (id.clone(), verdict)).collect();
                group.second();
                let now = group.now;
                prop_assert!(group.book.next_look().is_some_and(|at| at > now));
                for (id, after) in group.book.verdicts() {
                    let before = before.get(id).copied().unwrap_or_default();
                    match (before, after) {
                        (Verdict::Quarantined { until, .. }, _) if now < until => prop_assert_eq!(before, after),
                        (Verdict::Quarantined { .. }, Verdict::Healthy | Verdict::Suspect(_)) => {
                            prop_assert!(false, "{before:?} became {after:?}");
                        }
                        (_, Verdict::Probation { until }) => prop_assert!(until > now),
                        _ => {}
                    }
                    if let Verdict::Quarantined { until, times, .. } = after {
                        prop_assert!(until > now);
                        let length = until.saturating_duration_since(now);
                        prop_assert!(length <= secs(1800));
                        let last: &mut (Instant, u32) = last_until.entry(id.clone()).or_insert((until, times));
                        if last.0 != until {
                            prop_assert!(until > last.0);
                            prop_assert!(times == last.1 + 1 || times == 1);
                            prop_assert!(length >= secs(30));
                        }
                        *last = (until, times);
                    }
                }
                let there = group.book.verdicts().count();
                prop_assert!(group.quarantined().len() <= there / 2);
            }
        }
    }
}
