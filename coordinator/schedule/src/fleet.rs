//! What this coordinator knows of the instances: the store's list merged with what each instance says on its stream.
//!
//! Pure. The keeper of the streams feeds it, the scheduler reads it. Three sources disagree at times, and each is believed
//! for what it knows best: the store says which instances exist and where they are; the stream says which role an
//! instance has *now* and how busy it is; a broken stream says that it cannot be reached. The last view is kept while
//! the store is away: loss of the controller stops changes, never traffic.

#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

pub use baton_proto::Role;
use baton_proto::{GroupName, Incarnation, InstanceId, InstanceSpec, LegId, RoleEpoch, v1};
use tokio::time::Instant;

/// The role an instance holds, and whether it takes new requests in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Duty {
    pub role: Role,
    pub epoch: RoleEpoch,
    pub ready: bool,
}

impl From<&v1::RoleChange> for Duty {
    fn from(change: &v1::RoleChange) -> Self {
        Self {
            // A role this build does not know is none that it can use.
            role: Role::from_wire(change.role).unwrap_or(Role::None),
            epoch: RoleEpoch(change.epoch),
            ready: change.phase() == v1::Phase::Ready,
        }
    }
}

/// Where an instance is and what it runs; fixed for one incarnation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    pub id: InstanceId,
    pub incarnation: Incarnation,
    /// Prefill and decode are paired within a group.
    pub group: GroupName,
    pub model: String,
    pub revision: String,
    pub context_tokens: u32,
    /// Prefill and decode are paired only if the caches of one can be handed to the other: if this is equal.
    pub layout: String,
    pub block_tokens: u32,
    /// Of the KV cache of one token, over all layers, in bytes.
    pub token_bytes: u64,
    /// `host:port` of its Inference service.
    pub inference_endpoint: String,
    /// `host:port` of its Handoff service.
    pub handoff_endpoint: String,
}

impl From<&InstanceSpec> for Spec {
    fn from(spec: &InstanceSpec) -> Self {
        Self {
            id: spec.id.clone(),
            incarnation: spec.incarnation,
            group: spec.group.clone(),
            model: spec.model.name.clone(),
            revision: spec.model.revision.clone(),
            context_tokens: spec.context_tokens,
            layout: spec.kv_layout.handover_class().to_owned(),
            block_tokens: spec.kv_layout.block_tokens.max(1),
            token_bytes: spec.kv_layout.block_bytes.saturating_mul(spec.kv_layout.layers.into())
                / u64::from(spec.kv_layout.block_tokens.max(1)),
            inference_endpoint: spec.inference_endpoint.clone(),
            handoff_endpoint: spec.handoff_endpoint.clone(),
        }
    }
}

/// How busy an instance said it is, over all coordinators.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Running and waiting.
    pub sequences: u32,
    /// Prompt tokens accepted and still to be computed.
    pub queued_prefill_tokens: u64,
    /// 0 = not said.
    pub kv_blocks_total: u32,
    pub kv_blocks_free: u32,
    /// 0 = not yet measured.
    pub prefill_tokens_per_second: u64,
    /// 0 = not yet measured.
    pub decode_step_micros: u64,
    /// The last leg on the stream that this includes; `None`: the instance, of an earlier version, does not say.
    pub seen_leg: Option<LegId>,
}

/// Most prompt tokens an instance is believed to have queued.
const QUEUED_TOKENS_MOST: u64 = 1 << 32;
/// Longest decode step an instance is believed to have measured: one minute.
const DECODE_STEP_MICROS_MOST: u64 = 60_000_000;

/// Numbers beyond reason are cut down to where costs of instances still compare.
impl From<&v1::InstanceLoad> for Load {
    fn from(load: &v1::InstanceLoad) -> Self {
        Self {
            sequences: load.running_sequences.saturating_add(load.waiting_sequences),
            queued_prefill_tokens: load.queued_prefill_tokens.min(QUEUED_TOKENS_MOST),
            kv_blocks_total: load.kv_blocks_total,
            kv_blocks_free: load.kv_blocks_free.min(load.kv_blocks_total),
            prefill_tokens_per_second: load.prefill_tokens_per_second,
            decode_step_micros: load.decode_step_micros.min(DECODE_STEP_MICROS_MOST),
            seen_leg: load.seen_leg.map(LegId),
        }
    }
}

/// Whether the store's list has the instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listing {
    Listed,
    Missing { since: Instant },
}

/// The stream to the instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contact {
    Down { since: Instant },
    Up { incarnation: Incarnation, duty: Duty, load: Option<Load> },
}

/// One instance as this coordinator sees it.
#[derive(Debug, Clone)]
pub struct Instance {
    pub spec: Spec,
    listing: Listing,
    contact: Contact,
}

impl Instance {
    /// The role it may be given requests in, if any.
    pub fn duty(&self) -> Option<Duty> {
        match self.contact {
            // A stream to another incarnation than the listed one: the list is behind, and its endpoints may be too.
            Contact::Up { incarnation, duty, .. } if duty.ready && incarnation == self.spec.incarnation => {
                Some(duty)
            }
            _ => None,
        }
    }

    /// What it last said of its load; zeros until it has.
    pub fn load(&self) -> Load {
        match self.contact {
            Contact::Up { load, .. } => load.unwrap_or_default(),
            Contact::Down { .. } => Load::default(),
        }
    }
}

/// What changed between the store's lists, for whoever keeps the streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A new instance, or a new incarnation or address of a known one: (re)connect.
    Target(Spec),
    /// Gone from the list and unreachable for longer than the grace: forget it.
    Forget(InstanceId),
}

/// All instances that the store lists or listed lately.
#[derive(Debug)]
pub struct Fleet {
    /// By the revision of the model that they run, so that whoever places a request looks at those of its model alone.
    models: BTreeMap<String, BTreeMap<InstanceId, Instance>>,
    /// The revision under which an instance is found.
    revisions: HashMap<InstanceId, String>,
    /// The store's last list had nobody.
    orphaned: bool,
    absent_grace: Duration,
}

impl Fleet {
    /// `absent_grace`: how long an instance that the store no longer lists, but whose stream lives, is still used.
    pub fn new(absent_grace: Duration) -> Self {
        Self { models: BTreeMap::new(), revisions: HashMap::new(), orphaned: true, absent_grace }
    }

    fn get_mut(&mut self, id: &InstanceId) -> Option<&mut Instance> {
        self.models.get_mut(self.revisions.get(id)?)?.get_mut(id)
    }

    fn insert(&mut self, instance: Instance) {
        let (id, revision) = (instance.spec.id.clone(), instance.spec.revision.clone());
        self.revisions.insert(id.clone(), revision.clone());
        self.models.entry(revision).or_default().insert(id, instance);
    }

    fn remove(&mut self, id: &InstanceId) -> Option<Instance> {
        let revision = self.revisions.remove(id)?;
        let alike = self.models.get_mut(&revision)?;
        let instance = alike.remove(id);
        if alike.is_empty() {
            self.models.remove(&revision);
        }
        instance
    }

    /// Takes the store's present list, in the order of ids.
    pub fn list(&mut self, specs: &[Spec], now: Instant) -> Vec<Change> {
        debug_assert!(specs.is_sorted_by(|a, b| a.id < b.id));
        let mut changes = Vec::new();
        for spec in specs {
            match self.get_mut(&spec.id) {
                Some(known) if known.spec == *spec => known.listing = Listing::Listed,
                _ => {
                    let known = self.remove(&spec.id);
                    let contact = known.map_or(Contact::Down { since: now }, |known| known.contact);
                    self.insert(Instance { spec: spec.clone(), listing: Listing::Listed, contact });
                    changes.push(Change::Target(spec.clone()));
                }
            }
        }
        self.orphaned = specs.is_empty();
        for (id, instance) in self.models.values_mut().flatten() {
            if instance.listing == Listing::Listed && specs.binary_search_by(|spec| spec.id.cmp(id)).is_err()
            {
                instance.listing = Listing::Missing { since: now };
            }
        }
        changes
    }

    /// Forgets instances that have been both unlisted and unreachable for longer than the grace.
    pub fn sweep(&mut self, now: Instant) -> Vec<Change> {
        let grace = self.absent_grace;
        let gone = |since: Instant| now.saturating_duration_since(since) > grace;
        let mut forgotten: Vec<InstanceId> = Vec::new();
        for (id, instance) in self.models.values().flatten() {
            if let (Listing::Missing { since: a }, Contact::Down { since: b }) =
                (instance.listing, instance.contact)
                && gone(a)
                && gone(b)
            {
                forgotten.push(id.clone());
            }
        }
        forgotten.iter().for_each(|id| drop(self.remove(id)));
        forgotten.into_iter().map(Change::Forget).collect()
    }

    /// The stream to an instance stands.
    pub fn up(&mut self, id: &InstanceId, incarnation: Incarnation, duty: Duty) {
        if let Some(instance) = self.get_mut(id) {
            instance.contact = Contact::Up { incarnation, duty, load: None };
        }
    }

    /// The stream to an instance broke, or could not be opened.
    pub fn down(&mut self, id: &InstanceId, now: Instant) {
        if let Some(instance) = self.get_mut(id)
            && matches!(instance.contact, Contact::Up { .. })
        {
            instance.contact = Contact::Down { since: now };
        }
    }

    /// The instance says what it is now. Older epochs than the one held are ignored.
    pub fn duty(&mut self, id: &InstanceId, change: Duty) {
        if let Some(Instance { contact: Contact::Up { duty, .. }, .. }) = self.get_mut(id)
            && change.epoch >= duty.epoch
        {
            *duty = change;
        }
    }

    /// The instance says how busy it is.
    pub fn load(&mut self, id: &InstanceId, report: Load) {
        if let Some(Instance { contact: Contact::Up { load, .. }, .. }) = self.get_mut(id) {
            *load = Some(report);
        }
    }

    /// Instances of a model that may be given new requests, by id.
    ///
    /// One that the store dropped while it lists others was taken out on purpose: it is used for the grace, no longer.
    /// When the store lists none at all, of whatever model, the controller is the one that is away, and live streams are
    /// the truth.
    pub fn usable(&self, revision: &str, now: Instant) -> impl Iterator<Item = (&Instance, Duty)> {
        let alike = self.models.get(revision).into_iter().flat_map(BTreeMap::values);
        alike.filter_map(move |instance| self.trusted(instance, now))
    }

    fn trusted<'a>(&self, instance: &'a Instance, now: Instant) -> Option<(&'a Instance, Duty)> {
        let trusted = match instance.listing {
            Listing::Listed => true,
            Listing::Missing { since } => {
                self.orphaned || now.saturating_duration_since(since) <= self.absent_grace
            }
        };
        instance.duty().filter(|_| trusted).map(|duty| (instance, duty))
    }

    /// The model that an instance runs.
    pub fn revision(&self, id: &InstanceId) -> Option<&str> {
        self.revisions.get(id).map(String::as_str)
    }

    /// How many instances there are, of whatever model, usable or not.
    pub fn size(&self) -> usize {
        self.revisions.len()
    }

    /// How many instances of a model there are, usable or not.
    pub fn known(&self, revision: &str) -> usize {
        self.models.get(revision).map_or(0, BTreeMap::len)
    }

    /// Whether an instance of any other model serves.
    pub fn others_serve(&self, revision: &str, now: Instant) -> bool {
        let others = self.models.iter().filter(|(other, _)| *other != revision);
        let mut instances = others.flat_map(|(_, alike)| alike.values());
        instances.any(|instance| self.trusted(instance, now).is_some_and(|(_, duty)| duty.role != Role::None))
    }

    /// Every instance of every model, usable or not.
    pub fn all(&self) -> impl Iterator<Item = &Instance> {
        self.models.values().flat_map(BTreeMap::values)
    }
}

#[cfg(test)]
mod tests;
