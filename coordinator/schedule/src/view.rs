//! The fleet as placement looks at it: a row for each instance, made ready beforehand, so that a choice is one walk over
//! rows that lie side by side.
//!
//! Made of what [`Fleet`], [`Ledger`] and [`Speeds`] know. [`crate::board`] renews a row when something about its instance
//! changes, and all of them when the list of instances does; they are made anew only where instances have come or gone, or have
//! other peers.

mod class;

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use baton_proto::{GroupName, Incarnation, InstanceId, Protocols, RoleEpoch};
use tokio::time::Instant;

use crate::{
    NoPlace, Side,
    fleet::{Fleet, Instance, Role, Spec},
    ledger::{Ledger, Standing},
    links::Links,
    predict::{Speed, Speeds},
};
pub use class::Class;

/// An instance.
#[derive(Debug, Clone)]
pub struct Row {
    pub spec: Arc<Spec>,
    /// Its own for as long as it is known; nobody else has it ever.
    pub number: u32,
    /// The role in which it takes requests now. `None`: it takes none.
    pub role: Option<Role>,
    /// Of the role that it holds, whether or not it takes requests in it. `None`: it cannot be reached, or is stuck.
    pub role_epoch: Option<RoleEpoch>,
    /// It may be used until then; `None` = no end is known.
    pub until: Option<Instant>,
    /// Those with whom it can hand over KV caches share one of these; indices into [`Model::classes`].
    pub classes: Range<usize>,
    pub standing: Standing,
    pub speed: Speed,
    /// Of each sequence that it decoded of late, on average. `None`: it has not said.
    pub sequence_tokens: Option<f64>,
    /// How long what is queued there takes to be computed.
    pub queue_micros: f64,
    /// Caches on their way in and out.
    pub transfers: u32,
    /// The process that took requests last, and in which role.
    served: Option<(Incarnation, Role)>,
    /// Since when that one has taken requests, breaks included: whoever comes back is not new.
    pub ready_since: Instant,
    /// When it told its load last.
    pub reported: Instant,
    /// When it was chosen last, counted in requests.
    pub chosen: u64,
}

impl Row {
    pub fn is_usable(&self, now: Instant) -> bool {
        self.role.is_some() && self.until.is_none_or(|until| now <= until)
    }

    /// The part of the work that it takes.
    pub fn side(&self) -> Option<Side> {
        self.role.and_then(|role| match role {
            Role::None => None,
            Role::Mixed => Some(Side::Whole),
            Role::Prefill => Some(Side::Prefill),
            Role::Decode => Some(Side::Decode),
        })
    }

    /// Tokens of prompts that it can have computed since it told its load.
    pub fn computed_most(&self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.reported);
        self.speed.prefill_tokens_within(passed.as_secs_f64() * 1e6)
    }

    /// Tokens that a decode step attends to: those of each sequence, though several share blocks. Where these are not counted, as
    /// many as are in blocks that are used.
    pub fn context_tokens(&self) -> f64 {
        match self.sequence_tokens {
            Some(tokens) => tokens * self.standing.batch() as f64,
            None => self.standing.blocks_used() as f64 * f64::from(self.spec.block_tokens),
        }
    }

    /// Whether it computes prompts for others, or all of them.
    pub fn is_prefill(&self) -> bool {
        matches!(self.role, Some(Role::Prefill | Role::Mixed))
    }

    fn is_busy(&self) -> bool {
        self.is_prefill() && self.standing.queued_prefill_tokens > 0
    }

    /// What its instance is has changed, if anything has.
    fn is_now(&mut self, spec: &Spec) {
        if *self.spec != *spec {
            self.spec = Arc::new(spec.clone());
        }
    }

    fn renew(&mut self, fleet: &Fleet, instance: &Instance, ledger: &Ledger, speeds: &Speeds, now: Instant) {
        let load = instance.load();
        let duty = fleet.duty(instance);
        let role = duty.map(|(duty, _)| duty.role);
        if let Some(role) = role
            && self.served.replace((self.spec.incarnation, role)) != Some((self.spec.incarnation, role))
        {
            self.ready_since = now;
        }
        self.until = duty.and_then(|(_, until)| until);
        self.role = role;
        self.role_epoch = instance.role_epoch();
        self.standing = ledger.standing(&self.spec.id, &load);
        self.speed = speeds.of(&self.spec, now);
        self.sequence_tokens = speeds.sequence_tokens(&self.spec);
        self.transfers = load.transfers;
        let Standing { queued_prefill_tokens: tokens, queued_prefill_pairs: pairs, .. } = self.standing;
        self.queue_micros = self.speed.prefill_micros(tokens as f64, pairs as f64);
    }
}

/// The instances of one model's revision, by id.
#[derive(Debug, Clone)]
pub struct Model {
    revision: String,
    pub rows: Vec<Row>,
    /// By kind and version, so that those of one instance lie side by side.
    pub classes: Vec<Class>,
    /// Since when the one has taken requests that has for longest, in prefill and in decode.
    eldest: [Option<Instant>; 2],
}

/// See the module.
#[derive(Debug, Default)]
pub struct View {
    models: Vec<Model>,
    /// Model and row of each instance.
    places: HashMap<InstanceId, (usize, usize)>,
    numbers: u32,
    links: Links,
    /// How often all rows were made anew.
    #[cfg(test)]
    pub(crate) rebuilds: usize,
}

impl View {
    /// What a handoff between two instances is expected to take, in microseconds.
    pub fn handoff_micros(&self, prefill: &Row, decode: &Row, now: Instant) -> f64 {
        self.links.micros(prefill.number, decode.number, now)
    }

    /// A cache was handed over in this time; `None`: it could not be.
    pub fn learn_handoff(
        &mut self,
        prefill: &InstanceId,
        decode: &InstanceId,
        took: Option<Duration>,
        now: Instant,
    ) {
        let number = |id| self.row(id).map(|row| row.number);
        if let (Some(prefill), Some(decode)) = (number(prefill), number(decode)) {
            self.links.learn(prefill, decode, took, now);
        }
    }

    pub fn model(&self, revision: &str) -> Option<&Model> {
        self.models.iter().find(|model| model.revision == revision)
    }

    /// Whether an instance of any other model serves.
    pub fn others_serve(&self, revision: &str, now: Instant) -> bool {
        let others = self.models.iter().filter(|model| model.revision != revision);
        let mut rows = others.flat_map(|model| &model.rows);
        rows.any(|row| row.is_usable(now) && row.side().is_some())
    }

    /// Takes one out of `avoid`: the last that could fill the role which nobody fills, else the last of all. False: it is empty,
    /// or not why nobody is there.
    pub(crate) fn give_up(&self, avoid: &mut Vec<InstanceId>, lacks: NoPlace) -> bool {
        let wanted = match lacks {
            NoPlace::TooLarge(_) | NoPlace::TooManyChoices(_) | NoPlace::OtherModel | NoPlace::Busy => {
                return false;
            }
            NoPlace::NoPrefill => Some(Side::Prefill),
            NoPlace::NoDecode => Some(Side::Decode),
            NoPlace::NoInstance => None,
        };
        let side = |id: &InstanceId| self.row(id).and_then(Row::side);
        let would_do =
            |id: &InstanceId| matches!(side(id), Some(of) if of == Side::Whole || Some(of) == wanted);
        let missed = wanted.and_then(|_| avoid.iter().rposition(would_do));
        // Else it is not known who.
        let missed = missed.or(avoid.len().checked_sub(1));
        missed.is_some_and(|at| {
            avoid.remove(at);
            true
        })
    }

    pub fn row(&self, id: &InstanceId) -> Option<&Row> {
        let (model, row) = *self.places.get(id)?;
        self.models.get(model)?.rows.get(row)
    }

    /// The list of instances is another.
    pub fn listed(&mut self, fleet: &Fleet, ledger: &Ledger, speeds: &Speeds, now: Instant) {
        if !self.is_of(fleet) {
            return self.rebuild(fleet, ledger, speeds, now);
        }
        for (model, (_, instances)) in self.models.iter_mut().zip(fleet.models()) {
            for (at, instance) in instances.values().enumerate() {
                model.rows[at].is_now(&instance.spec);
                model.renew(at, fleet, instance, ledger, speeds, now);
            }
            model.find_eldest();
        }
    }

    /// Whether there are rows of just these instances, each with the peers that it has.
    fn is_of(&self, fleet: &Fleet) -> bool {
        let rows = self.models.iter().flat_map(|model| model.rows.iter().map(|row| row.spec.peers()));
        let instances = fleet.models().flat_map(|(_, alike)| alike.values());
        rows.eq(instances.map(|instance| instance.spec.peers()))
    }

    /// Instances have come, gone, or changed what they are.
    fn rebuild(&mut self, fleet: &Fleet, ledger: &Ledger, speeds: &Speeds, now: Instant) {
        #[cfg(test)]
        {
            self.rebuilds += 1;
        }
        let mut old: HashMap<InstanceId, Row> = HashMap::new();
        let mut classes: HashMap<String, Vec<Class>> = HashMap::new();
        for model in self.models.drain(..) {
            old.extend(model.rows.into_iter().map(|row| (row.spec.id.clone(), row)));
            classes.insert(model.revision, model.classes);
        }
        self.places.clear();
        for (revision, instances) in fleet.models() {
            let specs = instances.values().map(|instance| &instance.spec);
            let mut model = Model::of(revision, specs, classes.remove(revision).unwrap_or_default(), now);
            for instance in instances.values() {
                let spec = &instance.spec;
                let mut row = old.remove(&spec.id).unwrap_or_else(|| {
                    self.numbers += 1;
                    Row::new(spec, self.numbers, now)
                });
                row.is_now(spec);
                row.classes = model.classes_of(spec);
                row.renew(fleet, instance, ledger, speeds, now);
                model.classes[row.classes.clone()].iter_mut().for_each(|class| class.count(&row));
                self.places.insert(spec.id.clone(), (self.models.len(), model.rows.len()));
                model.rows.push(row);
            }
            model.find_eldest();
            self.models.push(model);
        }
    }

    /// Something about one instance has changed.
    pub fn renew(&mut self, id: &InstanceId, fleet: &Fleet, ledger: &Ledger, speeds: &Speeds, now: Instant) {
        let Some((model, row)) = self.places.get(id).copied() else { return };
        let (Some(model), Some(instance)) = (self.models.get_mut(model), fleet.get(id)) else { return };
        if model.renew(row, fleet, instance, ledger, speeds, now) {
            model.find_eldest();
        }
    }

    /// An instance has told its load.
    pub fn reported(&mut self, id: &InstanceId, now: Instant) {
        if let Some((model, row)) = self.places.get(id).copied() {
            self.models[model].rows[row].reported = now;
        }
    }

    /// A request for this model has come: it finds some of the instances busy.
    pub fn arrived(&mut self, revision: &str, now: Instant) {
        let Some(model) = self.models.iter_mut().find(|model| model.revision == revision) else { return };
        model.classes.iter_mut().for_each(|class| class.arrived(now));
    }

    /// An instance has been chosen for the `nth` request.
    pub fn chosen(&mut self, id: &InstanceId, nth: u64) {
        if let Some((model, row)) = self.places.get(id).copied() {
            self.models[model].rows[row].chosen = nth;
        }
    }
}

impl Row {
    fn new(spec: &Spec, number: u32, now: Instant) -> Self {
        Self {
            spec: Arc::new(spec.clone()),
            number,
            role: None,
            role_epoch: None,
            until: None,
            classes: 0..0,
            standing: Standing::default(),
            speed: Speed::default(),
            sequence_tokens: None,
            queue_micros: 0.0,
            transfers: 0,
            served: None,
            ready_since: now,
            reported: now,
            chosen: 0,
        }
    }
}

/// The eldest in each phase, if this one is there as well.
fn count_age(eldest: &mut [Option<Instant>; 2], row: &Row) {
    for phase in phases(row) {
        eldest[phase] = Some(eldest[phase].map_or(row.ready_since, |since| since.min(row.ready_since)));
    }
}

/// Which of prefill, 0, and decode, 1, an instance does.
fn phases(row: &Row) -> impl Iterator<Item = usize> {
    let phases = match row.side() {
        None => 0..0,
        Some(Side::Whole) => 0..2,
        Some(Side::Prefill) => 0..1,
        Some(Side::Decode) => 1..2,
    };
    phases.into_iter()
}

impl Model {
    /// With the classes of these instances, and no row yet. Classes that there were before are as busy as they were.
    fn of<'a>(
        revision: &str,
        instances: impl Iterator<Item = &'a Spec>,
        before: Vec<Class>,
        now: Instant,
    ) -> Self {
        let mut ranges: BTreeMap<(&GroupName, &str), Vec<Protocols>> = BTreeMap::new();
        for spec in instances {
            let ranges = ranges.entry((&spec.group, &spec.layout)).or_default();
            if !ranges.contains(&spec.handoff_protocols) {
                ranges.push(spec.handoff_protocols);
            }
        }
        let classes = ranges.into_iter().flat_map(|((group, layout), ranges)| {
            let before = &before;
            Protocols::meeting_points(ranges).into_iter().map(move |version| {
                let same = before.iter().find(|class| class.key() == (group, layout, version));
                same.map_or_else(|| Class::new(group, layout, version, now), Class::emptied)
            })
        });
        Self {
            revision: revision.to_owned(),
            rows: Vec::new(),
            classes: classes.collect(),
            eldest: [None; 2],
        }
    }

    /// Makes one of its rows what its instance is now: whether the eldest is to be looked for.
    fn renew(
        &mut self,
        at: usize,
        fleet: &Fleet,
        instance: &Instance,
        ledger: &Ledger,
        speeds: &Speeds,
        now: Instant,
    ) -> bool {
        let row = &mut self.rows[at];
        let classes = &mut self.classes[row.classes.clone()];
        classes.iter_mut().for_each(|class| class.discount(row));
        let (eldest, before) = (self.eldest, row.role);
        let is_eldest = |row: &Row| phases(row).any(|phase| eldest[phase] == Some(row.ready_since));
        let was_eldest = is_eldest(row);
        row.renew(fleet, instance, ledger, speeds, now);
        classes.iter_mut().for_each(|class| class.count(row));
        if was_eldest {
            return row.role != before || !is_eldest(row);
        }
        count_age(&mut self.eldest, row);
        false
    }

    /// How long the peers of an instance have taken requests, at most.
    pub fn eldest_age(&self, row: &Row, now: Instant) -> Duration {
        let since = phases(row).filter_map(|phase| self.eldest[phase]).min();
        now.saturating_duration_since(since.unwrap_or(row.ready_since))
    }

    /// To be called when an instance has come or gone, or when the eldest has changed its role.
    fn find_eldest(&mut self) {
        self.eldest = [None; 2];
        self.rows.iter().for_each(|row| count_age(&mut self.eldest, row));
    }

    fn classes_of(&self, spec: &Spec) -> Range<usize> {
        let key = |version| (&spec.group, spec.layout.as_str(), version);
        let from = self.classes.partition_point(|class| class.key() < key(spec.handoff_protocols.oldest()));
        let to = self.classes.partition_point(|class| class.key() <= key(spec.handoff_protocols.newest()));
        from..to
    }
}

#[cfg(test)]
mod tests;
