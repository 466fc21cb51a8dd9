//! A controller of the simulation, on a clock that may be fast or slow: it stands for leadership by the real election,
//! and then leads. Its calls of the store are futures polled by hand.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::Arc,
    time::Duration,
};

use baton_controller::{
    ControllerConfig,
    fleet::{Beat, SessionId},
    reconcile::{Order, Reconciler},
};
use baton_proto::{InstanceId, InstanceLoad, InstanceSpec};
use baton_registry::{
    Candidate, DesiredRole, HealthRecord, KeyRange, LeaderRecord, Leadership, Lease, Listing, ObservedStatus,
    StateFormats, Store, StoreError,
    keys::{self, Key},
    records,
};
use futures::FutureExt;
use tokio::time::Instant;

use crate::{
    checks::Findings,
    lead::{Call, Hold, Leading, RETRY, poll, poll_once},
    store::{Client, Keeper},
};

/// A controller's time: another zero and another speed than the world's, and a wall clock that may be wrong.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    pub(crate) zero: Instant,
    /// In thousandths of the world's.
    pub(crate) speed: u64,
    /// What the wall clock shows when the world begins.
    pub(crate) wall_millis: u64,
}

impl Clock {
    pub(crate) fn at(&self, world_ms: u64) -> Instant {
        self.zero + Duration::from_micros(world_ms * self.speed)
    }

    fn unix_millis(&self, local: Instant) -> u64 {
        let since = local.saturating_duration_since(self.zero);
        self.wall_millis + u64::try_from(since.as_millis()).expect("a short time")
    }

    /// When in the world it will show at least this.
    pub(crate) fn when(&self, local: Instant) -> u64 {
        let micros = local.saturating_duration_since(self.zero).as_nanos().div_ceil(1000);
        u64::try_from(micros).expect("a short time").div_ceil(self.speed)
    }
}

/// What comes by a connection.
#[derive(Clone)]
pub(crate) enum Said {
    Hello(Box<InstanceSpec>, Beat),
    Beat(Beat),
    Bye,
    Closed,
}

impl fmt::Debug for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let as_it_is =
            |beat: &Beat| format!("{} {} {}", beat.role.name(), beat.role_epoch, beat.phase.name());
        match self {
            Self::Hello(spec, beat) => {
                write!(f, "Hello({} {}, {})", spec.id, spec.incarnation, as_it_is(beat))
            }
            Self::Beat(beat) => write!(f, "Beat({})", as_it_is(beat)),
            Self::Bye => f.write_str("Bye"),
            Self::Closed => f.write_str("Closed"),
        }
    }
}

/// What a controller does to a connection.
#[derive(Debug)]
pub(crate) enum Out {
    Order(SessionId, Order),
    End(SessionId),
    NotLeading(SessionId),
}

enum Stand {
    Seeking { call: Call<Result<Option<Leadership>, StoreError>>, asked: Instant, again: Instant },
    Opening(Box<Opening>),
    Leading(Box<Leading>),
}

/// What a new leader needs before it leads.
struct Opening {
    leadership: Leadership,
    hold: Hold,
    lease: Option<Lease>,
    call: Call<Opened>,
    again: Instant,
}

enum Opened {
    Lease(Result<Lease, StoreError>),
    Listing(Result<Listing, StoreError>),
}

pub(crate) struct Controller {
    pub(crate) client: Client,
    pub(crate) clock: Clock,
    pub(crate) inbox: VecDeque<(SessionId, Said)>,
    config: Arc<ControllerConfig>,
    candidate: Candidate,
    stand: Stand,
}

impl Controller {
    pub(crate) fn new(index: usize, config: Arc<ControllerConfig>, clock: Clock, now: u64) -> Self {
        let client = Client::default();
        let record = LeaderRecord { controller_id: format!("c{index}"), endpoint: "127.0.0.1:1".into() };
        let candidate = Candidate {
            store: Arc::new(client.clone()),
            record,
            ttl: config.leader.ttl,
            formats: StateFormats::OURS,
        };
        let at = clock.at(now);
        let stand = Stand::Seeking { call: None, asked: at, again: at };
        Self { client, clock, inbox: VecDeque::new(), config, candidate, stand }
    }

    pub(crate) fn leading(&self) -> Option<&Leading> {
        match &self.stand {
            Stand::Leading(leading) => Some(leading),
            _ => None,
        }
    }

    /// The epoch under which it believes to lead.
    pub(crate) fn epoch(&self) -> Option<u64> {
        match &self.stand {
            Stand::Seeking { .. } => None,
            Stand::Opening(opening) => Some(opening.leadership.epoch().0),
            Stand::Leading(leading) => Some(leading.leadership.epoch().0),
        }
    }

    /// Gives the leadership up, as a controller that stops.
    pub(crate) fn resign(&self) {
        if let Some(leading) = self.leading() {
            let leadership = leading.leadership.clone();
            // The request is on its way as soon as it is first polled; nobody waits for the answer.
            poll_once(&mut Some(async move { leadership.resign().await }.boxed()));
        }
    }

    /// Does all that can be done now.
    pub(crate) fn step(&mut self, now: u64, keeper: &Keeper, findings: &mut Findings) -> Vec<Out> {
        let now = self.clock.at(now);
        let mut out = Vec::new();
        let lost = match &mut self.stand {
            Stand::Seeking { .. } => false,
            Stand::Opening(opening) => opening.hold.lost(&self.client, now),
            Stand::Leading(leading) => {
                leading.hold.lost(&self.client, now) || leading.run(&mut self.inbox, now, findings, &mut out)
            }
        };
        if lost {
            if let Stand::Leading(leading) = &self.stand {
                out.extend(leading.lines.iter().copied().map(Out::End));
            }
            self.stand = Stand::Seeking { call: None, asked: now, again: now };
        }
        self.stand_for_it(now, keeper, findings);
        if self.leading().is_none() {
            let hellos = self.inbox.drain(..).filter(|(_, said)| matches!(said, Said::Hello(..)));
            out.extend(hellos.map(|(session, _)| Out::NotLeading(session)));
        }
        out
    }

    fn stand_for_it(&mut self, now: Instant, keeper: &Keeper, findings: &mut Findings) {
        if let Stand::Seeking { call, asked, again } = &mut self.stand {
            match poll(call) {
                Some(Ok(Some(leadership))) => {
                    let ttl = self.config.leader.ttl;
                    let hold = Hold::new(keeper.lease_of(leadership.epoch().0), ttl, *asked);
                    let opening = Opening { leadership, hold, lease: None, call: None, again: now };
                    self.stand = Stand::Opening(Box::new(opening));
                }
                Some(_) => *again = now + RETRY,
                None if call.is_none() && *again <= now => {
                    let candidate = self.candidate.clone();
                    *asked = now;
                    *call = Some(async move { candidate.try_lead().await }.boxed());
                    poll_once(call);
                }
                None => {}
            }
        }
        self.open(now, findings);
    }

    fn open(&mut self, now: Instant, findings: &mut Findings) {
        let Stand::Opening(opening) = &mut self.stand else { return };
        let Opening { leadership, hold, lease, call, again } = &mut **opening;
        match poll(call) {
            Some(Opened::Lease(Ok(granted))) => *lease = Some(granted),
            Some(Opened::Listing(Ok(listing))) => {
                let (sessions, roles) = (self.config.sessions.clone(), self.config.roles.clone());
                let health = self.config.health.clone();
                let mut mind = Reconciler::new(sessions, roles, health, leadership.epoch(), now);
                let Left { instances, roles, health } = load(listing);
                mind.inherit(instances, roles, now);
                mind.inherit_health(health.clone(), now, self.clock.unix_millis(now));
                findings.inherited(&health, &mind, now);
                let records = lease.expect("it was granted first");
                let leading =
                    Leading::new(mind, self.client.clone(), leadership.clone(), hold.take(now), records, now);
                self.stand = Stand::Leading(Box::new(leading));
                return;
            }
            Some(_) => *again = now + RETRY,
            None => {}
        }
        if call.is_none() && *again <= now {
            let (store, ttl) = (self.client.clone(), self.config.leader.records_ttl);
            *call = Some(match lease {
                None => async move { Opened::Lease(store.grant_lease(ttl).await) }.boxed(),
                Some(_) => {
                    async move { Opened::Listing(store.range(KeyRange::prefix(keys::ROOT)).await) }.boxed()
                }
            });
            poll_once(call);
        }
    }

    /// When it has something to do without being told anything, in the world's time.
    pub(crate) fn wake(&self) -> u64 {
        let local = match &self.stand {
            Stand::Seeking { call: Some(_), .. } => return u64::MAX,
            Stand::Seeking { again, .. } => *again,
            Stand::Opening(opening) => {
                let Opening { hold, call, again, .. } = &**opening;
                if call.is_some() { hold.wake() } else { hold.wake().min(*again) }
            }
            Stand::Leading(leading) => leading.wake(),
        };
        self.clock.when(local)
    }
}

/// What earlier leaders left.
#[derive(Default)]
struct Left {
    instances: Vec<(InstanceSpec, Option<Beat>)>,
    roles: BTreeMap<InstanceId, DesiredRole>,
    health: BTreeMap<InstanceId, HealthRecord>,
}

/// As `lead.rs` reads it.
fn load(listing: Listing) -> Left {
    let (mut left, mut specs, mut statuses) = (Left::default(), Vec::new(), BTreeMap::new());
    for item in listing.items {
        let value = &item.value;
        match Key::parse(&item.key) {
            Key::Instance(_) => specs.push(records::decode_spec(value).expect("a spec")),
            Key::Role(id) => left.roles.extend([(id, DesiredRole::decode(value).expect("a role"))]),
            Key::Health(id) => left.health.extend([(id, HealthRecord::decode(value).expect("a record"))]),
            Key::Status(id) => statuses.extend([(id, ObservedStatus::decode(value).expect("a status"))]),
            _ => {}
        }
    }
    let with_beat = |spec: InstanceSpec| {
        let status = statuses.get(&spec.id).filter(|status| status.incarnation == spec.incarnation);
        let beat = status.map(|status| Beat {
            role: status.role,
            role_epoch: status.role_epoch,
            phase: status.phase,
            load_permille: status.load_permille,
            load: InstanceLoad::default(),
        });
        (spec, beat)
    };
    left.instances = specs.into_iter().map(with_beat).collect();
    left
}
