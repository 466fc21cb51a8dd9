//! A group and its Deployment that live by themselves: pods that come up and go, instances that get roles and drain, and
//! people, crashes and new leaders in between. Every action is checked as it is made.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;

/// How often the scaler looks.
const TICK: Duration = Duration::from_secs(5);
/// How long a pod takes until its instance is there, and until it has gone.
const BOOT: Duration = Duration::from_secs(20);
const LEAVING: Duration = Duration::from_secs(12);
const PHASES: [Role; 2] = [Role::Prefill, Role::Decode];
/// Steps of one look, at most.
const STEPS: usize = 8;

/// What comes in between.
#[derive(Debug, Clone)]
pub(super) enum Trouble {
    Wanted(usize),
    Little,
    Unasked,
    Unknown,
    /// One does badly, and is left without a role while another serves in its place.
    Quarantine(usize),
    /// All may show how they do.
    Probation,
    /// Somebody sets the Deployment's replicas.
    Replicas(u32),
    /// Another controller leads.
    Leader,
    /// A process ends, and its pod starts it again.
    Crash,
    /// Somebody takes one out of service.
    Cordon(usize),
    Uncordon,
    /// Draining takes so many seconds from now on.
    Slow(u64),
    /// Kubernetes refuses for a while.
    Refuse,
}

struct One {
    pod: Pod,
    /// When its instance is there and it is ready; when it has gone.
    up_at: Instant,
    gone_at: Option<Instant>,
    role: Role,
    cordoned: Option<(By, Instant)>,
    drained: bool,
    quarantined: bool,
    /// As parts of Kubernetes still believe.
    was_ready: bool,
}

pub(super) struct World {
    rng: StdRng,
    now: Instant,
    scaler: Scaler,
    demand: Demand,
    replicas: u32,
    ones: BTreeMap<String, One>,
    /// Of those that have gone.
    records: BTreeSet<String>,
    born: usize,
    drain: Duration,
    refusals: usize,
    actions: usize,
    changes: (usize, usize),
    /// The pods of which one may go; none if somebody else set the replicas.
    named: Vec<String>,
}

impl World {
    pub(super) fn new(seed: u64, replicas: u32) -> Self {
        let mut world = Self {
            rng: StdRng::seed_from_u64(seed),
            now: Instant::now(),
            scaler: Scaler::new(limits()),
            demand: Demand::Unasked,
            replicas,
            ones: BTreeMap::new(),
            records: BTreeSet::new(),
            born: 0,
            drain: Duration::from_secs(7),
            refusals: 0,
            actions: 0,
            changes: (0, 0),
            named: Vec::new(),
        };
        world.live(Duration::from_secs(60));
        world
    }

    pub(super) fn replicas(&self) -> u32 {
        self.replicas
    }

    pub(super) fn actions(&self) -> usize {
        self.actions
    }

    pub(super) fn changes(&self) -> (usize, usize) {
        self.changes
    }

    pub(super) fn is_at_rest(&self) -> bool {
        let quiet = |one: &One| !one.pod.leaving && one.cordoned.is_none();
        self.ones.len() == self.replicas as usize && self.ones.values().all(quiet) && self.records.is_empty()
    }

    pub(super) fn serving_well(&self) -> usize {
        self.ones.values().filter(|one| one.role != Role::None && !one.quarantined).count()
    }

    pub(super) fn recover(&mut self, wanted: usize) {
        (self.drain, self.refusals) = (Duration::from_secs(7), 0);
        self.suffer(Trouble::Uncordon);
        self.suffer(Trouble::Probation);
        self.suffer(Trouble::Wanted(wanted));
    }

    pub(super) fn suffer(&mut self, trouble: Trouble) {
        let others = |one: &One| matches!(one.cordoned, Some((By::Others, _)));
        match trouble {
            Trouble::Wanted(wanted) => {
                let (prefill, decode) = ((wanted / 2).max(1), wanted.saturating_sub(wanted / 2).max(1));
                self.demand = Demand::Measured(Split { prefill, decode });
            }
            Trouble::Little => self.demand = Demand::Little,
            Trouble::Unasked => self.demand = Demand::Unasked,
            Trouble::Unknown => self.demand = Demand::Unknown,
            Trouble::Quarantine(index) => {
                if let Some(one) = self.ones.values_mut().nth(index) {
                    one.quarantined = true;
                }
            }
            Trouble::Probation => self.ones.values_mut().for_each(|one| one.quarantined = false),
            Trouble::Replicas(replicas) => (self.replicas, self.named) = (replicas, Vec::new()),
            Trouble::Leader => self.scaler = Scaler::new(limits()),
            Trouble::Crash => {
                let up_at = self.now + BOOT;
                if let Some(name) = self.any() {
                    let one = self.ones.get_mut(&name).expect("it is there");
                    (one.up_at, one.role, one.pod.ready) = (up_at, Role::None, false);
                    self.may_go_too(name);
                }
            }
            Trouble::Cordon(index) => {
                let now = self.now;
                if let Some((name, one)) = self.ones.iter_mut().nth(index) {
                    one.cordoned = Some((By::Others, now));
                    let name = name.clone();
                    self.may_go_too(name);
                }
            }
            Trouble::Uncordon => {
                self.ones.values_mut().filter(|one| others(one)).for_each(|one| one.cordoned = None);
            }
            Trouble::Slow(seconds) => self.drain = Duration::from_secs(seconds),
            Trouble::Refuse => self.refusals = 5,
        }
    }

    fn any(&mut self) -> Option<String> {
        let index = self.rng.random_range(0..self.ones.len().max(1));
        self.ones.keys().nth(index).cloned()
    }

    /// One that ceased to be ready after it was said which may go.
    fn may_go_too(&mut self, name: String) {
        if !self.named.is_empty() {
            self.named.push(name);
        }
    }

    pub(super) fn live(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.now += TICK;
            // Kubernetes is not always there at once.
            if self.rng.random_range(0..3) > 0 {
                self.kubernetes();
            }
            self.fleet();
            for _ in 0..STEPS {
                let action = self.scaler.decide(&self.seen(), self.now).action;
                if action == Action::Wait {
                    break;
                }
                self.actions += 1;
                self.check(&action);
                if self.refusals > 0 {
                    self.refusals -= 1;
                    break;
                }
                self.make(action);
            }
        }
    }

    fn kubernetes(&mut self) {
        let now = self.now;
        let (gone, here): (BTreeMap<_, _>, _) = std::mem::take(&mut self.ones)
            .into_iter()
            .partition(|(_, one)| one.gone_at.is_some_and(|at| at <= now));
        self.ones = here;
        let ours = |(_, one): &(String, One)| matches!(one.cordoned, Some((By::Us, _)));
        self.records.extend(gone.into_iter().filter(ours).map(|(name, _)| name));
        let alive = self.alive();
        for _ in alive..self.replicas as usize {
            self.born += 1;
            let pod = Pod { placed: true, running: true, ready: false, ..pod() };
            let one = One {
                pod,
                up_at: now + BOOT,
                gone_at: None,
                role: Role::None,
                cordoned: None,
                drained: false,
                quarantined: false,
                was_ready: false,
            };
            self.ones.insert(format!("n{}", self.born), one);
        }
        for _ in self.replicas as usize..alive {
            let name = self.first_to_go();
            let named = std::mem::take(&mut self.named);
            let one = self.ones.get_mut(&name).expect("it is there");
            let harmless = one.role == Role::None || named.is_empty();
            assert!(named.contains(&name) || harmless, "{name} serves, and it goes");
            (one.pod.leaving, one.gone_at) = (true, Some(now + LEAVING));
        }
    }

    fn alive(&self) -> usize {
        self.ones.values().filter(|one| !one.pod.leaving).count()
    }

    /// By Kubernetes, which may be behind: the last born, if nothing else tells them apart.
    fn first_to_go(&mut self) -> String {
        let behind = self.rng.random_range(0..2) > 0;
        let alive = self.ones.iter().filter(|(_, one)| !one.pod.leaving);
        let rank = |one: &One| {
            let ready = if behind { one.was_ready } else { one.pod.ready };
            Pod { ready, ..one.pod.clone() }.rank()
        };
        let key = |(name, one): &(&String, &One)| (rank(one), std::cmp::Reverse(name.len()));
        alive.min_by_key(key).expect("there is one").0.clone()
    }

    /// As the planner would have it.
    fn fleet(&mut self) {
        let now = self.now;
        for (name, one) in &mut self.ones {
            one.was_ready = one.pod.ready;
            // Its own readiness, by a probe that is sometimes late.
            let own = one.up_at <= now && !(one.cordoned.is_some() && one.drained);
            if self.rng.random_range(0..3) > 0 {
                one.pod.ready = own;
            }
            if own && self.named.contains(name) {
                // One that had only just started has come after all, in the moment between the change and the deletion.
                self.named.clear();
            }
        }
        let mut serving = [Role::Prefill, Role::Decode].map(|role| self.serving(role));
        for one in self.ones.values_mut().filter(|one| one.up_at <= now && !one.pod.leaving) {
            match one.cordoned {
                None if one.quarantined => {
                    let others = |phase: usize| serving[phase] > usize::from(one.role == PHASES[phase]);
                    if one.role != Role::None && others(0) && others(1) {
                        serving[usize::from(one.role == Role::Decode)] -= 1;
                        one.role = Role::None;
                    }
                }
                None => {
                    one.drained = false;
                    if one.role == Role::None {
                        let fewest = usize::from(serving[0] > serving[1]);
                        one.role = [Role::Prefill, Role::Decode][fewest];
                        serving[fewest] += 1;
                    } else if serving.contains(&0) {
                        let missing = usize::from(serving[1] == 0);
                        if serving[1 - missing] > 1 {
                            one.role = [Role::Prefill, Role::Decode][missing];
                            (serving[missing], serving[1 - missing]) = (1, serving[1 - missing] - 1);
                        }
                    }
                }
                Some((_, since)) => {
                    let spared = serving.iter().all(|count| *count > 0);
                    if now >= since + self.drain && (spared || one.role == Role::None) {
                        (one.role, one.drained) = (Role::None, true);
                    }
                }
            }
        }
    }

    fn serving(&self, role: Role) -> usize {
        let serves = |one: &&One| one.role == role && one.cordoned.is_none() && !one.pod.leaving;
        self.ones.values().filter(serves).count()
    }

    fn seen(&self) -> Seen {
        let idle = self.demand == Demand::Little;
        let of = |(name, one): (&String, &One)| Instance {
            id: id(name),
            pod: Some(name.clone()),
            here: one.up_at <= self.now,
            role: one.role,
            sequences: u32::from(one.role != Role::None && !idle),
            drained: one.drained,
            quarantined: one.quarantined,
            cordoned: one.cordoned.map(|(by, _)| by),
        };
        let gone = self.records.iter().map(|name| Instance {
            here: false,
            cordoned: Some(By::Us),
            ..instance(name, Role::None)
        });
        Seen {
            demand: self.demand,
            replicas: self.replicas,
            pods: self.ones.iter().map(|(name, one)| (name.clone(), one.pod.clone())).collect(),
            instances: self.ones.iter().map(of).chain(gone).collect(),
        }
    }

    /// What must hold whenever it is asked for.
    fn check(&self, action: &Action) {
        match action {
            Action::ScaleIn { to, pods } => {
                assert!(*to >= MIN && *to + 1 == self.replicas, "{} to {to}", self.replicas);
                assert_eq!(self.alive(), self.replicas as usize, "something is under way");
                for pod in pods {
                    let one = &self.ones[pod];
                    let ours = matches!(one.cordoned, Some((By::Us, _)));
                    let drained = ours && one.drained && one.role == Role::None;
                    assert!(!one.pod.ready && (drained || one.up_at > self.now), "{pod} serves");
                }
            }
            Action::ScaleOut { to } => assert!(*to > self.replicas && *to <= MAX),
            Action::Cordon(id) => {
                let one = &self.ones[id.as_str()];
                assert!(one.cordoned.is_none(), "others hold it");
                let ours = |one: &One| matches!(one.cordoned, Some((By::Us, _))) && !one.pod.leaving;
                assert!(!self.ones.values().any(ours), "another is to go");
                let others = [Role::Prefill, Role::Decode]
                    .map(|role| self.serving(role) - usize::from(one.role == role));
                assert!(one.role == Role::None || others.iter().all(|count| *count > 0), "it is the last");
            }
            Action::Uncordon(id, _) => {
                let cordoned = self.ones.get(id.as_str()).and_then(|one| one.cordoned);
                let ours = matches!(cordoned, Some((By::Us, _))) || self.records.contains(id.as_str());
                assert!(ours, "others hold it");
            }
            Action::Wait => {}
        }
    }

    fn make(&mut self, action: Action) {
        let now = self.now;
        match action {
            Action::ScaleOut { to } => (self.replicas, self.changes.0) = (to, self.changes.0 + 1),
            Action::ScaleIn { to, pods } => {
                (self.replicas, self.changes.1, self.named) = (to, self.changes.1 + 1, pods);
            }
            Action::Cordon(id) => {
                self.ones.get_mut(id.as_str()).expect("it is there").cordoned = Some((By::Us, now));
            }
            Action::Uncordon(id, _) => {
                self.records.remove(id.as_str());
                if let Some(one) = self.ones.get_mut(id.as_str()) {
                    one.cordoned = None;
                }
            }
            Action::Wait => {}
        }
    }
}
