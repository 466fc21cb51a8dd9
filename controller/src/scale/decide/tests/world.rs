//! A group and its Deployment that live by themselves: pods that come up and go, instances that get roles and drain, and
//! people, crashes and new leaders in between. Every action is checked as it is made.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;

/// How often the scaler looks.
const TICK: Duration = Duration::from_secs(5);
/// How long a pod takes until its instance is there, and until it has gone.
const BOOT: Duration = Duration::from_secs(20);
const LEAVING: Duration = Duration::from_secs(12);
/// Steps of one look, at most.
const STEPS: usize = 8;

/// What comes in between.
#[derive(Debug, Clone)]
pub(super) enum Trouble {
    Wanted(usize),
    Little,
    Unasked,
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
        let quiet = |one: &One| !one.pod.leaving && !one.pod.marked && one.cordoned.is_none();
        self.ones.len() == self.replicas as usize && self.ones.values().all(quiet) && self.records.is_empty()
    }

    pub(super) fn recover(&mut self, wanted: usize) {
        (self.drain, self.refusals) = (Duration::from_secs(7), 0);
        self.suffer(Trouble::Uncordon);
        self.suffer(Trouble::Wanted(wanted));
    }

    pub(super) fn suffer(&mut self, trouble: Trouble) {
        let others = |one: &One| matches!(one.cordoned, Some((By::Others, _)));
        match trouble {
            Trouble::Wanted(wanted) => {
                let (prefill, decode) = ((wanted / 2).max(1), wanted.saturating_sub(wanted / 2).max(1));
                self.demand = Demand::Measured(Wanted { prefill, decode });
            }
            Trouble::Little => self.demand = Demand::Little,
            Trouble::Unasked => self.demand = Demand::Unasked,
            Trouble::Replicas(replicas) => self.replicas = replicas,
            Trouble::Leader => self.scaler = Scaler::new(limits()),
            Trouble::Crash => {
                let up_at = self.now + BOOT;
                if let Some(one) = self.any() {
                    (one.up_at, one.role, one.pod.ready) = (up_at, Role::None, false);
                }
            }
            Trouble::Cordon(index) => {
                let now = self.now;
                if let Some(one) = self.ones.values_mut().nth(index) {
                    one.cordoned = Some((By::Others, now));
                }
            }
            Trouble::Uncordon => {
                self.ones.values_mut().filter(|one| others(one)).for_each(|one| one.cordoned = None);
            }
            Trouble::Slow(seconds) => self.drain = Duration::from_secs(seconds),
            Trouble::Refuse => self.refusals = 5,
        }
    }

    fn any(&mut self) -> Option<&mut One> {
        let index = self.rng.random_range(0..self.ones.len().max(1));
        self.ones.values_mut().nth(index)
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
            };
            self.ones.insert(format!("n{}", self.born), one);
        }
        for _ in self.replicas as usize..alive {
            let name = self.first_to_go();
            let one = self.ones.get_mut(&name).expect("it is there");
            (one.pod.leaving, one.gone_at) = (true, Some(now + LEAVING));
        }
    }

    fn alive(&self) -> usize {
        self.ones.values().filter(|one| !one.pod.leaving).count()
    }

    /// By Kubernetes: the last born, if nothing else tells them apart.
    fn first_to_go(&self) -> String {
        let alive = self.ones.iter().filter(|(_, one)| !one.pod.leaving);
        let key =
            |(name, one): &(&String, &One)| (one.pod.rank(), !one.pod.marked, std::cmp::Reverse(name.len()));
        alive.min_by_key(key).expect("there is one").0.clone()
    }

    /// As the planner would have it.
    fn fleet(&mut self) {
        let now = self.now;
        for one in self.ones.values_mut().filter(|one| one.up_at <= now) {
            one.pod.ready = true;
        }
        let mut serving = [Role::Prefill, Role::Decode].map(|role| self.serving(role));
        for one in self.ones.values_mut().filter(|one| one.up_at <= now && !one.pod.leaving) {
            match one.cordoned {
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
            Action::ScaleIn { to, pod } => {
                assert!(*to >= MIN && *to + 1 == self.replicas, "{} to {to}", self.replicas);
                assert_eq!(self.alive(), self.replicas as usize, "something is under way");
                assert_eq!(*pod, self.first_to_go(), "another would go");
                let one = &self.ones[pod];
                let ours = matches!(one.cordoned, Some((By::Us, _)));
                let drained = ours && one.drained && one.role == Role::None;
                let stray = one.up_at > self.now && !one.pod.ready;
                assert!(one.pod.marked && (drained || stray), "it serves");
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
            Action::Mark(_) | Action::Unmark(_) | Action::Wait => {}
        }
    }

    fn make(&mut self, action: Action) {
        let now = self.now;
        match action {
            Action::ScaleOut { to } => (self.replicas, self.changes.0) = (to, self.changes.0 + 1),
            Action::ScaleIn { to, .. } => (self.replicas, self.changes.1) = (to, self.changes.1 + 1),
            Action::Cordon(id) => {
                self.ones.get_mut(id.as_str()).expect("it is there").cordoned = Some((By::Us, now));
            }
            Action::Uncordon(id, _) => {
                self.records.remove(id.as_str());
                if let Some(one) = self.ones.get_mut(id.as_str()) {
                    one.cordoned = None;
                }
            }
            Action::Mark(pod) => self.ones.get_mut(&pod).expect("it is there").pod.marked = true,
            Action::Unmark(pod) => self.ones.get_mut(&pod).expect("it is there").pod.marked = false,
            Action::Wait => {}
        }
    }
}
