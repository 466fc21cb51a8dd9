//! Random histories: instances that come, crash, freeze, return and obey in any order, a store that fails at times,
//! and leaders that change. After every step the invariants of the design are checked.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

#[derive(Debug, Clone, Copy)]
enum Step {
    Start(usize),
    Crash(usize),
    Leave(usize),
    /// The session breaks, the process lives.
    Cut(usize),
    Load(usize),
    Obey(usize),
    Pass(u64),
    StoreFails(bool),
    /// Another leader takes over; the store keeps what it has, or begins anew.
    Lead {
        anew: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0..NAMES.len();
    prop_oneof![
        4 => who.clone().prop_map(Step::Start),
        1 => who.clone().prop_map(Step::Crash),
        1 => who.clone().prop_map(Step::Leave),
        1 => who.clone().prop_map(Step::Cut),
        4 => who.clone().prop_map(Step::Load),
        6 => who.prop_map(Step::Obey),
        4 => (1u64..4000).prop_map(Step::Pass),
        1 => any::<bool>().prop_map(Step::StoreFails),
        1 => any::<bool>().prop_map(|anew| Step::Lead { anew }),
    ]
}

/// A process of an instance, as it knows itself.
#[derive(Debug, Clone)]
struct Server {
    incarnation: u64,
    beat: Beat,
    session: Option<SessionId>,
    /// What it was told and has not yet taken on.
    order: Option<DesiredRole>,
}

struct Storm {
    mind: Reconciler,
    now: Instant,
    epoch: u64,
    last_session: u64,
    incarnations: u64,
    servers: BTreeMap<usize, Server>,
    stored: BTreeMap<String, Bytes>,
    store_fails: bool,
    /// The highest epoch that each instance was ever told of, over all its lives and all leaders.
    told: BTreeMap<usize, u64>,
}

impl Storm {
    fn new() -> Self {
        let now = Instant::now() + Duration::from_secs(1000);
        let mind = Reconciler::new(
            SessionConfig::default(),
            RoleConfig::default(),
            HealthConfig::default(),
            LeaderEpoch(1),
            now,
        );
        Self {
            mind,
            now,
            epoch: 1,
            last_session: 0,
            incarnations: 0,
            servers: BTreeMap::new(),
            stored: BTreeMap::new(),
            store_fails: false,
            told: BTreeMap::new(),
        }
    }

    fn act(&mut self, step: Step) {
        match step {
            Step::Start(who) if !self.servers.contains_key(&who) => {
                self.incarnations += 1;
                let incarnation = self.incarnations;
                self.servers.insert(who, Server { incarnation, beat: silent(), session: None, order: None });
            }
            Step::Crash(who) => {
                if let Some(session) = self.servers.remove(&who).and_then(|server| server.session) {
                    self.event(Event::Closed { session });
                }
            }
            Step::Leave(who) => {
                if let Some(session) = self.servers.remove(&who).and_then(|server| server.session) {
                    self.event(Event::Bye { session, reason: String::new() });
                }
            }
            Step::Cut(who) => {
                if let Some(session) = self.servers.get_mut(&who).and_then(|server| server.session.take()) {
                    self.event(Event::Closed { session });
                }
            }
            Step::Load(who) => self.report(who, |server| {
                if server.beat.phase == Phase::Loading {
                    server.beat.phase = Phase::Waiting;
                }
            }),
            Step::Obey(who) => self.report(who, |server| {
                if server.beat.phase != Phase::Loading
                    && let Some(order) = server.order.take()
                {
                    server.beat = beat(Phase::Ready, order.role, order.epoch.0);
                }
            }),
            Step::Pass(millis) => self.pass(millis),
            Step::StoreFails(fails) => self.store_fails = fails,
            Step::Lead { anew } => self.lead(anew),
            Step::Start(_) => {}
        }
        self.settle();
        self.check();
    }

    fn report(&mut self, who: usize, change: impl FnOnce(&mut Server)) {
        let Some(server) = self.servers.get_mut(&who) else { return };
        change(server);
        if let (Some(session), beat) = (server.session, server.beat) {
            self.event(Event::Beat { session, beat });
        }
    }

    fn pass(&mut self, millis: u64) {
        self.now += Duration::from_millis(millis);
        // Whoever lives beats, and calls again if its session is gone.
        for who in self.servers.keys().copied().collect::<Vec<_>>() {
            let server = self.servers[&who].clone();
            match server.session {
                Some(session) => self.event(Event::Beat { session, beat: server.beat }),
                None => {
                    self.last_session += 1;
                    let session = SessionId(self.last_session);
                    self.servers.get_mut(&who).expect("it lives").session = Some(session);
                    let mut spec = Box::new(instance_spec(NAMES[who], server.incarnation));
                    // Every other start is at another address.
                    spec.inference_endpoint = format!("x:{}", server.incarnation / 2);
                    self.event(Event::Hello { session, spec, beat: server.beat, unix_millis: 0 });
                }
            }
        }
    }

    fn lead(&mut self, anew: bool) {
        self.epoch += 10_000;
        let (mut instances, mut roles) = (Vec::new(), BTreeMap::new());
        if anew {
            self.stored.clear();
        }
        for name in NAMES {
            let get = |record: Record| self.stored.get(&record.key()).cloned();
            if let Some(value) = get(Record::Instance(id(name))) {
                instances.push((decode_spec(&value).expect("a spec"), None));
            }
            if let Some(value) = get(Record::Role(id(name))) {
                roles.insert(id(name), DesiredRole::decode(&value).expect("a role"));
            }
        }
        let config = (SessionConfig::default(), RoleConfig::default());
        self.mind =
            Reconciler::new(config.0, config.1, HealthConfig::default(), LeaderEpoch(self.epoch), self.now);
        self.mind.inherit(instances, roles, self.now);
        for server in self.servers.values_mut() {
            server.session = None;
        }
    }

    fn event(&mut self, event: Event) {
        let commands = self.mind.handle(event, self.now);
        self.take(commands);
    }

    fn settle(&mut self) {
        let commands = self.mind.conclude(self.now);
        self.take(commands);
        let writes = self.mind.take_writes(3);
        if self.store_fails {
            return self.mind.give_back(writes);
        }
        for write in writes {
            match &write.value {
                Some(value) => drop(self.stored.insert(write.key(), value.clone())),
                None => drop(self.stored.remove(&write.key())),
            }
            if let (Record::Role(id), Some(epoch)) = (write.record, write.epoch) {
                self.event(Event::RoleStored { id, epoch });
            }
        }
    }

    fn take(&mut self, commands: Vec<Command>) {
        for command in commands {
            let session = match &command {
                Command::Order(session, _) | Command::Close(session) => *session,
            };
            let who =
                self.servers.iter().find(|(_, server)| server.session == Some(session)).map(|(who, _)| *who);
            let Some(who) = who else { continue };
            let server = self.servers.get_mut(&who).expect("just found");
            match command {
                Command::Close(_) => server.session = None,
                Command::Order(_, Order::Assign(desired)) => {
                    let key = keys::role(&id(NAMES[who]));
                    let stored =
                        self.stored.get(&key).map(|value| DesiredRole::decode(value).expect("a role"));
                    assert!(
                        stored.is_some_and(|stored| stored.epoch >= desired.epoch),
                        "{} was told {desired:?} before it was written",
                        NAMES[who]
                    );
                    assert!(desired.epoch > server.beat.role_epoch, "an assignment that would be ignored");
                    let last = self.told.entry(who).or_default();
                    assert!(desired.epoch.0 >= *last, "epochs go back from {last} to {desired:?}");
                    *last = desired.epoch.0;
                    server.order = Some(desired);
                }
                Command::Order(..) => {}
            }
        }
    }

    fn check(&self) {
        let members = self.mind.members();
        for (id, member) in members {
            assert_eq!(id, &member.spec.id);
            if let Some(session) = member.session() {
                assert_eq!(self.mind.sessions.get(&session), Some(id));
            }
        }
        let connected = members.values().filter_map(Member::session).collect::<BTreeSet<_>>();
        assert_eq!(connected, self.mind.sessions.keys().copied().collect(), "a session without its member");
    }

    /// With a working store and everyone obedient for long enough, the fleet is as it should be.
    fn calm(&mut self) {
        self.store_fails = false;
        for _ in 0..400 {
            for who in self.servers.keys().copied().collect::<Vec<_>>() {
                self.act(Step::Load(who));
                self.act(Step::Obey(who));
            }
            self.act(Step::Pass(500));
        }
        while self.mind.has_writes() {
            self.settle();
        }
        let roles: Vec<_> = self.servers.values().map(|server| server.beat.role).collect();
        let count = |role| roles.iter().filter(|held| **held == role).count();
        match roles.len() {
            0 => {}
            1 => assert_eq!(roles, [Role::Mixed]),
            n => {
                assert!(count(Role::Prefill) >= 1 && count(Role::Decode) >= 1, "{roles:?}");
                assert_eq!(count(Role::Prefill) + count(Role::Decode), n, "{roles:?}");
                assert!(count(Role::Prefill).abs_diff(count(Role::Decode)) <= 1, "{roles:?}");
            }
        }
        let registered: BTreeSet<_> =
            self.servers.keys().map(|who| keys::instance(&id(NAMES[*who]))).collect();
        let stored: BTreeSet<_> =
            self.stored.keys().filter(|key| key.starts_with(keys::INSTANCES)).cloned().collect();
        assert_eq!(stored, registered, "the store knows who is here, and nobody else");
        assert!(self.mind.members().values().all(|member| member.stuck.is_none()), "stuck for ever");
        for (who, server) in &self.servers {
            let stored = DesiredRole::decode(&self.stored[&keys::role(&id(NAMES[*who]))]).expect("a role");
            assert_eq!((stored.role, stored.epoch), (server.beat.role, server.beat.role_epoch));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn any_history_keeps_the_invariants_and_ends_well(steps in proptest::collection::vec(step(), 1..120)) {
        let mut storm = Storm::new();
        for step in steps {
            storm.act(step);
        }
        storm.calm();
    }
}
