//! What this coordinator knows of the instances: the store's list merged with what each instance says on its stream.
//!
//! Pure. The keeper of the streams feeds it, the scheduler reads it. Three sources disagree at times, and each is believed
//! for what it knows best: the store says which instances exist and where they are; the stream says which role an
//! instance has *now* and how busy it is; a broken stream says that it cannot be reached. The last view is kept while
//! the store is away: loss of the controller stops changes, never traffic.

mod load;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

pub use baton_proto::Role;
use baton_proto::{GroupName, Incarnation, InstanceId, InstanceSpec, Protocols, RoleEpoch, v1};
pub use load::{Load, Timed};
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
    /// On which and how many devices it runs: those that run one model on the same are about as fast.
    pub hardware: String,
    /// Of the protocol by which they are handed: those of a pair have one in common.
    pub handoff_protocols: Protocols,
    pub block_tokens: u32,
    /// Of the KV cache of one token, over all layers, in bytes.
    pub token_bytes: u64,
    /// `host:port` of its Inference service.
    pub inference_endpoint: String,
    /// `host:port` of its Handoff service.
    pub handoff_endpoint: String,
}

impl Spec {
    /// Which instance it is, and what its peers follow from.
    pub(crate) fn peers(&self) -> (&InstanceId, &str, &GroupName, &str, Protocols) {
        (&self.id, &self.revision, &self.group, &self.layout, self.handoff_protocols)
    }
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
            hardware: format!(
                "{} x {}, tensor parallel {}",
                spec.device, spec.device_count, spec.kv_layout.tensor_parallel
            ),
            handoff_protocols: spec.handoff_protocols,
            block_tokens: spec.kv_layout.block_tokens.max(1),
            token_bytes: spec.kv_layout.block_bytes.saturating_mul(spec.kv_layout.layers.into())
                / u64::from(spec.kv_layout.block_tokens.max(1)),
            inference_endpoint: spec.inference_endpoint.clone(),
            handoff_endpoint: spec.handoff_endpoint.clone(),
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
    Down {
        since: Instant,
    },
    Up {
        incarnation: Incarnation,
        duty: Duty,
        load: Option<Load>,
        /// It has stopped to get on with its work, or to answer.
        stuck: bool,
    },
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
            Contact::Up { incarnation, duty, stuck: false, .. }
                if duty.ready && incarnation == self.spec.incarnation =>
            {
                Some(duty)
            }
            _ => None,
        }
    }

    /// The epoch of the role that it holds, whether or not it takes requests in it, if it can be reached and gets on.
    pub fn role_epoch(&self) -> Option<RoleEpoch> {
        match self.contact {
            Contact::Up { incarnation, duty, stuck: false, .. } if incarnation == self.spec.incarnation => {
                Some(duty.epoch)
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

    /// Takes the store's present list, in the order of ids: who is to be connected to, and whether the list is another than
    /// the last.
    pub fn list(&mut self, specs: &[Spec], now: Instant) -> (Vec<Change>, bool) {
        debug_assert!(specs.is_sorted_by(|a, b| a.id < b.id));
        if self.orphaned && !specs.is_empty() {
            // Whoever the store's next list lacks may not have come back to it yet.
            for instance in self.models.values_mut().flat_map(BTreeMap::values_mut) {
                if let Listing::Missing { since } = &mut instance.listing {
                    *since = now;
                }
            }
        }
        let mut changes = Vec::new();
        let mut other = self.orphaned != specs.is_empty();
        for spec in specs {
            match self.get_mut(&spec.id) {
                Some(known) if known.spec == *spec => {
                    other |= known.listing != Listing::Listed;
                    known.listing = Listing::Listed;
                }
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
                other = true;
            }
        }
        other |= !changes.is_empty();
        (changes, other)
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
            instance.contact = Contact::Up { incarnation, duty, load: None, stuck: false };
        }
    }

    /// The stream to an instance broke, or could not be opened; whether it stood.
    pub fn down(&mut self, id: &InstanceId, now: Instant) -> bool {
        match self.get_mut(id) {
            Some(instance) if matches!(instance.contact, Contact::Up { .. }) => {
                instance.contact = Contact::Down { since: now };
                true
            }
            _ => false,
        }
    }

    /// Whether the instance behind a stream that stands does not get on; whether that is new. It is given nothing while it
    /// does not: of a coordinator that was cut off, all are so, and their streams are about to break.
    pub fn set_stuck(&mut self, id: &InstanceId, is: bool) -> bool {
        match self.get_mut(id) {
            Some(Instance { contact: Contact::Up { stuck, .. }, .. }) => std::mem::replace(stuck, is) != is,
            _ => false,
        }
    }

    /// The instance says what it is now; whether that is new. Older epochs than the one held are ignored.
    pub fn changed(&mut self, id: &InstanceId, change: Duty) -> bool {
        match self.get_mut(id) {
            Some(Instance { contact: Contact::Up { duty, .. }, .. }) if change.epoch >= duty.epoch => {
                std::mem::replace(duty, change) != change
            }
            _ => false,
        }
    }

    /// The instance says how busy it is.
    pub fn load(&mut self, id: &InstanceId, report: Load) {
        if let Some(Instance { contact: Contact::Up { load, .. }, .. }) = self.get_mut(id) {
            *load = Some(report);
        }
    }

    /// What an instance may be given, and until when, if an end is known.
    ///
    /// One that the store dropped while it lists others was taken out on purpose: it is used for the grace, no longer.
    /// When the store lists none at all, of whatever model, the controller is the one that is away, and live streams are
    /// the truth; from when it lists somebody again the others have the grace to come back.
    pub fn duty(&self, instance: &Instance) -> Option<(Duty, Option<Instant>)> {
        let until = match instance.listing {
            Listing::Missing { since } if !self.orphaned => Some(since + self.absent_grace),
            Listing::Listed | Listing::Missing { .. } => None,
        };
        instance.duty().map(|duty| (duty, until))
    }

    /// The model that an instance runs.
    pub fn revision(&self, id: &InstanceId) -> Option<&str> {
        self.revisions.get(id).map(String::as_str)
    }

    /// How many instances there are, of whatever model, usable or not.
    pub fn size(&self) -> usize {
        self.revisions.len()
    }

    /// Instances by id, of each model's revision.
    pub fn models(&self) -> impl Iterator<Item = (&str, &BTreeMap<InstanceId, Instance>)> {
        self.models.iter().map(|(revision, alike)| (revision.as_str(), alike))
    }

    pub fn get(&self, id: &InstanceId) -> Option<&Instance> {
        self.models.get(self.revisions.get(id)?)?.get(id)
    }
}

#[cfg(test)]
mod tests;
