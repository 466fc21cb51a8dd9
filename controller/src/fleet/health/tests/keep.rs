//! What a change of leader leaves of quarantines and probations.

use baton_registry::Standing;
use proptest::prelude::*;

use super::{
    times::{is_probation, sentence, spell, until},
    *,
};

impl Group {
    /// By a wall clock that is right.
    pub(super) fn unix_millis(&self) -> u64 {
        1_700_000_000_000 + u64::try_from((self.now - self.began).as_millis()).expect("a short time")
    }

    /// Another controller takes over, whose clock shows this.
    fn lead_anew(&mut self, unix_millis: u64) {
        self.book = HealthBook::new(self.book.config.clone(), BEAT, MOST);
        let beat = self.instances[0].beat;
        assert_eq!(self.book.inherit(self.stored.clone(), &beat, self.now, unix_millis), []);
    }
}

/// d0 was quarantined 10 s ago, for 30 s.
fn quarantined() -> Group {
    let mut group = Group::new(2, 2);
    group.run(10);
    group.does("d0", WEDGED);
    group.until_quarantine(20);
    group.does("d0", DECODES);
    group.run(10);
    assert_eq!(sentence(&group, "d0"), (20, 1));
    group
}

#[test]
fn a_quarantine_goes_on_under_the_next_leader_and_is_followed_by_its_probation() {
    let mut group = quarantined();
    let before = group.verdict("d0");
    group.lead_anew(group.unix_millis());
    assert_eq!(group.verdict("d0"), before, "before anybody is heard, too");
    assert_eq!(until(&mut group, 40, "d0", is_probation), 20);
    group.run(60);
    let Verdict::Probation { until: end } = group.verdict("d0") else { panic!("{:?}", group.verdict("d0")) };
    group.lead_anew(group.unix_millis());
    assert_eq!(group.verdict("d0"), Verdict::Probation { until: end });
    group.does("d0", WEDGED);
    assert_eq!(group.until_quarantine(20).0, 9, "on probation a suspicion is enough");
    assert_eq!(sentence(&group, "d0"), (60, 2));
    group.lead_anew(group.unix_millis());
    assert_eq!(sentence(&group, "d0"), (60, 2));
}

#[test]
fn how_often_it_was_is_remembered_over_leaders_and_forgotten_in_the_end() {
    let mut group = quarantined();
    group.run(200);
    assert_eq!(group.verdict("d0"), Verdict::Healthy);
    assert_eq!(group.stored[&id("d0")].standing, Standing::Well);
    group.lead_anew(group.unix_millis());
    group.does("d0", WEDGED);
    group.run(20);
    assert_eq!(sentence(&group, "d0").1, 2);
    group.does("d0", DECODES);
    group.run(60 + 120 + 1801);
    assert_eq!(group.stored, BTreeMap::new());
    // Who never comes back is forgotten as well.
    let mut group = quarantined();
    group.of("d0").silent = true;
    group.lead_anew(group.unix_millis());
    group.run(1801);
    assert_eq!(group.stored, BTreeMap::new());
    assert_eq!(group.book.verdicts().count(), 3);
}

#[test]
fn beats_write_nothing() {
    let mut group = quarantined();
    assert_eq!(group.writes, 1);
    group.run(19);
    assert_eq!(group.writes, 1);
    group.run(3600);
    assert_eq!(group.writes, 4, "the quarantine, the probation, its end, and that it is forgotten");
}

#[test]
fn a_clock_that_is_wrong_makes_no_quarantine_longer() {
    for (skew, left) in [(0, 20), (-5_000, 25), (-86_400_000, 30), (15_000, 5), (86_400_000, 0)] {
        let mut group = quarantined();
        group.lead_anew(group.unix_millis().saturating_add_signed(skew));
        assert_eq!(sentence(&group, "d0"), (left, 1), "ahead by {skew} ms");
        assert_eq!(until(&mut group, 40, "d0", is_probation), left.max(1));
    }
}

#[test]
fn what_cannot_be_used_is_said() {
    let group = quarantined();
    let (beat, now, unix_millis) = (group.instances[0].beat, group.now, group.unix_millis());
    let mut off = HealthBook::new(HealthConfig { enabled: false, ..HealthConfig::default() }, BEAT, MOST);
    assert_eq!(off.inherit(group.stored.clone(), &beat, now, unix_millis), [id("d0")]);
    let mut of_another_kind = group.stored.clone();
    let record = of_another_kind.get_mut(&id("d0")).expect("it is stored");
    record.standing = Standing::Quarantined { reason: "haunted".into(), measure: 1.0 };
    let mut book = HealthBook::new(HealthConfig::default(), BEAT, MOST);
    assert_eq!(book.inherit(of_another_kind, &beat, now, unix_millis), [id("d0")]);
    assert_eq!(book.verdict(&id("d0")), Verdict::Healthy);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever instances do and whenever leaders change: what is held of quarantines and probations stays as it is.
    #[test]
    fn leaders_may_change_at_any_time(
        spells in prop::collection::vec((spell(), prop::bool::weighted(0.3)), 1..30),
    ) {
        let mut group = Group::new(2, 4);
        for ((who, work, silent, seconds), changes) in spells {
            let instance = &mut group.instances[who];
            (instance.work, instance.silent) = (work, silent);
            group.run(seconds);
            if changes {
                let held = |group: &Group| -> Vec<(InstanceId, Verdict)> {
                    let verdicts = group.book.verdicts().map(|(id, verdict)| (id.clone(), verdict));
                    let lasting = |verdict: &Verdict| verdict.is_quarantined() || is_probation(verdict);
                    verdicts.filter(|(_, verdict)| lasting(verdict)).collect()
                };
                let before = held(&group);
                group.lead_anew(group.unix_millis());
                prop_assert_eq!(held(&group), before);
            }
        }
    }
}
