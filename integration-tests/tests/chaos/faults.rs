//! Which faults come when: drawn from a seed, every few seconds one, several at a time, but never so that a role, the
//! coordinators or the controllers are gone altogether, nor etcd's majority.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use baton_proto::v1::Role;
use futures::future::join_all;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::sleep;

use crate::{
    clients::{self, Service},
    fleet::{Fleet, Harm, Kind, Seen},
    net::{self, Way},
};

/// Between one fault and the next.
const PAUSE_MILLIS: std::ops::Range<u64> = 2000..5000;
/// Servers that may be harmed at a time, or not yet be back.
const SERVERS_OUT_MOST: usize = 2;
/// Whoever was harmed is well again so long afterwards, or never.
const RECOVERS_WITHIN: Duration = Duration::from_secs(120);
/// For so long after a fault the controller may still list what was before: an instance's lease and more.
const LISTED_STILL: Duration = Duration::from_secs(8);
const TICK: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Harm(Harm, usize),
    /// The way between the two; it is the second that counts as harmed.
    Apart((usize, usize), Way),
    /// A server is drained, and given back later.
    Drain(usize),
}

impl What {
    fn victim(self) -> usize {
        match self {
            Self::Harm(_, victim) | Self::Apart((_, victim), _) | Self::Drain(victim) => victim,
        }
    }
}

/// A fault that was.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    /// As in "kill -9 decode".
    pub(crate) name: String,
    /// A server was harmed.
    pub(crate) of_a_server: bool,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
}

pub(crate) struct Schedule<'a> {
    fleet: &'a mut Fleet,
    service: &'a Service,
    client: reqwest::Client,
    rng: StdRng,
    ongoing: Vec<(What, Fault)>,
    /// Those that were harmed and are not known to be well again, and since when they could be.
    recovering: BTreeMap<usize, Instant>,
    /// Those whose drain is over, and since when, until a controller has been told.
    drained: BTreeMap<usize, Instant>,
    faults: Vec<Fault>,
    begin: Instant,
}

impl<'a> Schedule<'a> {
    pub(crate) fn new(fleet: &'a mut Fleet, service: &'a Service, seed: u64) -> Self {
        Self {
            fleet,
            service,
            client: clients::client(),
            rng: StdRng::seed_from_u64(seed),
            ongoing: Vec::new(),
            recovering: BTreeMap::new(),
            drained: BTreeMap::new(),
            faults: Vec::new(),
            begin: Instant::now(),
        }
    }

    /// Lets faults come until then and mends all; what was, and who ended without having been killed.
    pub(crate) async fn run(mut self, until: Instant) -> (Vec<Fault>, Vec<String>) {
        let mut deaths = Vec::new();
        let mut next = Instant::now() + Duration::from_millis(PAUSE_MILLIS.start);
        loop {
            let now = Instant::now();
            let over = now >= until;
            let (due, ongoing) =
                std::mem::take(&mut self.ongoing).into_iter().partition(|(_, it)| over || it.ended <= now);
            self.ongoing = ongoing;
            for (what, fault) in due {
                self.mend(what, fault);
            }
            deaths.extend(self.fleet.deaths());
            self.give_back().await;
            self.look().await;
            let late = self
                .recovering
                .iter()
                .chain(&self.drained)
                .filter(|(_, since)| since.elapsed() > RECOVERS_WITHIN);
            let late = late.map(|(member, _)| self.fleet.member(*member).name.clone());
            deaths.extend(
                late.map(|name| format!("{name} is not well {RECOVERS_WITHIN:?} after it was harmed")),
            );
            // Those that ended by themselves do not come back.
            if !deaths.is_empty() || over && self.recovering.is_empty() && self.drained.is_empty() {
                for (what, fault) in std::mem::take(&mut self.ongoing) {
                    self.mend(what, fault);
                }
                return (self.faults, deaths);
            }
            if !over && now >= next {
                self.inject().await;
                next = now + Duration::from_millis(self.rng.random_range(PAUSE_MILLIS));
            }
            sleep(TICK).await;
        }
    }

    fn say(&self, what: &str) {
        eprintln!("{:7.2} s: {what}", self.begin.elapsed().as_secs_f64());
    }

    fn coordinator(&self, member: usize) -> Option<usize> {
        self.fleet.of(Kind::Coordinator).into_iter().position(|it| it == member)
    }

    fn mend(&mut self, what: What, mut fault: Fault) {
        match what {
            What::Harm(_, victim) => self.fleet.mend(victim),
            What::Apart(pair, way) => self.fleet.find(pair, way),
            // It recovers from when it is given back.
            What::Drain(victim) => _ = self.drained.insert(victim, Instant::now()),
        }
        self.say(&format!("  end of {}, {}", fault.name, self.fleet.member(what.victim()).name));
        fault.ended = Instant::now();
        self.faults.push(fault);
        if !matches!(what, What::Drain(_)) {
            self.recovering.insert(what.victim(), Instant::now());
        }
    }

    /// Has those back whose drain is over, as soon as a controller can be told.
    async fn give_back(&mut self) {
        for (member, since) in std::mem::take(&mut self.drained) {
            if self.fleet.undrain(member).await {
                self.recovering.insert(member, Instant::now());
            } else {
                self.drained.insert(member, since);
            }
        }
    }

    /// Sees who is well again.
    async fn look(&mut self) {
        let recovering = self.recovering.keys().copied();
        let well = recovering.map(async |member| (member, self.fleet.is_well(&self.client, member).await));
        let well = join_all(well).await;
        let servers = well.iter().any(|(member, _)| self.fleet.member(*member).kind == Kind::Server);
        let seen = if servers { self.fleet.seen().await.unwrap_or_default() } else { Vec::new() };
        for (member, _) in well.into_iter().filter(|(_, well)| *well) {
            let serves = seen.iter().any(|it| it.member == member && it.serves);
            let listed = self.recovering[&member].elapsed() > LISTED_STILL;
            if self.fleet.member(member).kind == Kind::Server && !(serves && listed) {
                continue;
            }
            self.recovering.remove(&member);
            if let Some(coordinator) = self.coordinator(member) {
                self.service.back(coordinator);
            }
        }
    }

    fn is_out(&self, member: usize) -> bool {
        let harmed = self.ongoing.iter().any(|(what, _)| what.victim() == member);
        harmed || self.recovering.contains_key(&member) || self.drained.contains_key(&member)
    }

    fn out(&self, kind: Kind) -> usize {
        self.fleet.of(kind).into_iter().filter(|member| self.is_out(*member)).count()
    }

    /// Whether the others can do without it.
    fn can_be_spared(&self, victim: usize, seen: &[Seen]) -> bool {
        let kind = self.fleet.member(victim).kind;
        if self.is_out(victim) {
            return false;
        }
        if kind != Kind::Server {
            return self.out(kind) == 0;
        }
        let Some(role) = role_of(victim, seen) else { return false };
        let stays = |it: &&Seen| it.member != victim && it.serves && !self.is_out(it.member);
        let of_role = seen.iter().filter(stays).filter(|it| it.role == role || it.role == Role::Mixed);
        self.out(Kind::Server) < SERVERS_OUT_MOST && of_role.count() > 0
    }

    fn draw_of(&mut self, kind: Kind) -> usize {
        let members = self.fleet.of(kind);
        members[self.rng.random_range(0..members.len())]
    }

    fn draw(&mut self) -> What {
        let kinds =
            [Kind::Etcd, Kind::Controller, Kind::Coordinator, Kind::Server, Kind::Server, Kind::Server];
        let pairs = [
            (Kind::Server, Kind::Server),
            (Kind::Server, Kind::Server),
            (Kind::Coordinator, Kind::Server),
            (Kind::Controller, Kind::Server),
            (Kind::Coordinator, Kind::Etcd),
            (Kind::Controller, Kind::Etcd),
            (Kind::Etcd, Kind::Etcd),
        ];
        if net::inside() && self.rng.random_bool(0.25) {
            let (one, other) = pairs[self.rng.random_range(0..pairs.len())];
            let way = [Way::Both, Way::There, Way::Back][self.rng.random_range(0..3)];
            return What::Apart((self.draw_of(one), self.draw_of(other)), way);
        }
        if self.rng.random_bool(0.3) {
            return What::Drain(self.draw_of(Kind::Server));
        }
        let harms = if net::inside() {
            &[Harm::Kill, Harm::Freeze, Harm::Cut][..]
        } else {
            &[Harm::Kill, Harm::Freeze]
        };
        let harm = harms[self.rng.random_range(0..harms.len())];
        let kind = kinds[self.rng.random_range(0..kinds.len())];
        What::Harm(harm, self.draw_of(kind))
    }

    /// One fault, if there can be one.
    async fn inject(&mut self) {
        let seen = self.fleet.seen().await.unwrap_or_default();
        for _ in 0..50 {
            let what = self.draw();
            let longest = match what {
                What::Harm(Harm::Kill, _) => 6000,
                What::Harm(Harm::Freeze, _) => 20_000,
                What::Harm(Harm::Cut, _) | What::Apart(..) | What::Drain(_) => 15_000,
            };
            let lasts = Duration::from_millis(self.rng.random_range(1000..longest));
            if !self.can_be_spared(what.victim(), &seen) {
                continue;
            }
            if let What::Apart((one, other), _) = what
                && (one == other || self.is_out(one))
            {
                continue;
            }
            if let What::Drain(victim) = what
                && !self.fleet.drain(victim).await
            {
                self.drained.insert(victim, Instant::now());
                continue;
            }
            let name = self.name(what, &seen);
            self.say(&format!("{name}, {}, for {lasts:.1?}", self.fleet.member(what.victim()).name));
            if let (What::Harm(_, victim), Some(coordinator)) = (what, self.coordinator(what.victim())) {
                debug_assert_eq!(self.fleet.member(victim).kind, Kind::Coordinator);
                self.service.gone(coordinator);
            }
            match what {
                What::Harm(harm, victim) => self.fleet.harm(victim, harm),
                What::Apart(pair, way) => self.fleet.lose(pair, way),
                What::Drain(_) => {}
            }
            let of_a_server = self.fleet.member(what.victim()).kind == Kind::Server;
            let began = Instant::now();
            self.ongoing.push((what, Fault { name, of_a_server, began, ended: began + lasts }));
            return;
        }
    }

    fn name(&self, what: What, seen: &[Seen]) -> String {
        let called = |member: usize| match self.fleet.member(member).kind {
            Kind::Server => match role_of(member, seen) {
                Some(role) => role.as_str_name().trim_start_matches("ROLE_").to_lowercase(),
                None => "server".to_owned(),
            },
            kind => format!("{kind:?}").to_lowercase(),
        };
        match what {
            What::Harm(Harm::Kill, victim) => format!("kill -9 {}", called(victim)),
            What::Harm(Harm::Freeze, victim) => format!("freeze {}", called(victim)),
            What::Harm(Harm::Cut, victim) => format!("cut off {}", called(victim)),
            What::Apart((one, other), Way::Both) => format!("cut {} from {}", called(one), called(other)),
            What::Apart((one, other), Way::There) => format!("lose {} to {}", called(one), called(other)),
            What::Apart((one, other), Way::Back) => format!("lose {} to {}", called(other), called(one)),
            What::Drain(victim) => format!("drain {}", called(victim)),
        }
    }
}

fn role_of(member: usize, seen: &[Seen]) -> Option<Role> {
    seen.iter().find(|it| it.member == member && it.serves).map(|it| it.role)
}
