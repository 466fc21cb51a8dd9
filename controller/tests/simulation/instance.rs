//! A process of an instance in the simulation: what it holds, whom it calls, what it was told. The world moves it.

use std::time::Duration;

use baton_controller::fleet::Beat;
use baton_proto::{Incarnation, InstanceLoad, InstanceSpec, Phase, Protocols, Role, RoleEpoch};
use baton_registry::{DesiredRole, testing::instance_spec};

/// What comes to it by its connection.
#[derive(Debug, Clone)]
pub(crate) enum Heard {
    Welcome,
    Assign(DesiredRole),
    Refuse {
        held: Option<Incarnation>,
    },
    /// The connection has ended, or the controller does not lead.
    End,
}

/// What it has to do next about its role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    Drain,
    TakeOn,
    Nothing,
}

#[derive(Debug, Clone)]
pub(crate) struct Process {
    /// Index of its name.
    pub(crate) name: usize,
    pub(crate) incarnation: u64,
    /// Whether a controller knows its incarnation, so that it is no more raised.
    pub(crate) settled: bool,
    pub(crate) address: u64,
    pub(crate) supervised: bool,
    /// Which other instances understand its caches.
    /// Its first bit: its KV layout is another. The others: which versions of the handoff protocol it speaks, 1, 2, both, or
    /// 2 and 3.
    pub(crate) build: u8,
    pub(crate) alive: bool,
    pub(crate) frozen: bool,
    /// It beats, and does not drain.
    pub(crate) obstinate: bool,
    /// It has work and computes nothing.
    pub(crate) wedged: bool,
    pub(crate) role: Role,
    pub(crate) epoch: RoleEpoch,
    pub(crate) phase: Phase,
    pending: Option<(Role, RoleEpoch)>,
    /// Its connection, and whether it was welcomed there.
    pub(crate) line: Option<(u64, bool)>,
    /// What came while it was frozen.
    pub(crate) held: Vec<(u64, Heard)>,
    /// Whom it calls next, how many of this round are left, and how many rounds were fruitless.
    pub(crate) calls: usize,
    pub(crate) left: usize,
    pub(crate) fruitless: u32,
}

impl Process {
    pub(crate) fn new(name: usize, incarnation: u64, address: u64) -> Self {
        Self {
            name,
            incarnation,
            settled: false,
            address,
            supervised: false,
            build: 0,
            alive: true,
            frozen: false,
            obstinate: false,
            wedged: false,
            role: Role::None,
            epoch: RoleEpoch(0),
            phase: Phase::Loading,
            pending: None,
            line: None,
            held: Vec::new(),
            calls: name,
            left: 0,
            fruitless: 0,
        }
    }

    /// Of handing caches over.
    pub(crate) fn protocols(&self) -> Protocols {
        let (oldest, newest) = [(1, 1), (2, 2), (1, 2), (2, 3)][usize::from(self.build >> 1)];
        Protocols::between(oldest, newest)
    }

    pub(crate) fn spec(&self, name: &str, group: &str) -> InstanceSpec {
        let mut spec = instance_spec(name, self.incarnation);
        spec.group = baton_proto::GroupName::new(group).expect("a good name");
        spec.kv_layout.fingerprint = format!("x{}", self.build & 1);
        spec.handoff_protocols = self.protocols();
        spec.inference_endpoint = format!("127.0.0.1:{}", self.address);
        if self.supervised {
            spec.labels.insert("supervisor".into(), format!("of {name}"));
        }
        spec
    }

    pub(crate) fn beat(&self) -> Beat {
        let (role, role_epoch, phase) = (self.role, self.epoch, self.phase);
        let load = InstanceLoad { running_sequences: u32::from(self.wedged), ..InstanceLoad::default() };
        Beat { role, role_epoch, phase, load_permille: 1000, load }
    }

    pub(crate) fn newest(&self) -> RoleEpoch {
        self.pending.map_or(self.epoch, |(_, epoch)| epoch)
    }

    /// As the server's role machine.
    pub(crate) fn assigned(&mut self, desired: &DesiredRole) -> Next {
        let (role, epoch) = (desired.role, desired.epoch);
        if epoch <= self.newest() {
            return Next::Nothing;
        }
        match self.phase {
            Phase::Ready if role == self.role => self.epoch = epoch,
            Phase::Ready => {
                (self.pending, self.phase) = (Some((role, epoch)), Phase::Draining);
                return Next::Drain;
            }
            Phase::Draining if role == self.role => {
                (self.pending, self.epoch, self.phase) = (None, epoch, Phase::Ready);
            }
            Phase::Waiting => {
                (self.pending, self.phase) = (Some((role, epoch)), Phase::Switching);
                return Next::TakeOn;
            }
            Phase::Loading | Phase::Draining | Phase::Switching => self.pending = Some((role, epoch)),
        }
        Next::Nothing
    }

    /// Loaded, or drained.
    pub(crate) fn go_on(&mut self) -> Next {
        match (self.phase, self.pending) {
            (Phase::Loading, None) => self.phase = Phase::Waiting,
            (Phase::Loading | Phase::Draining, Some(_)) => {
                self.phase = Phase::Switching;
                return Next::TakeOn;
            }
            _ => {}
        }
        Next::Nothing
    }

    pub(crate) fn taken_on(&mut self) {
        if self.phase == Phase::Switching
            && let Some((role, epoch)) = self.pending.take()
        {
            (self.role, self.epoch, self.phase) = (role, epoch, Phase::Ready);
        }
    }

    /// What of prefill and decode it does now. One on its way from one role to another goes on with what both have.
    pub(crate) fn serves(&self) -> (bool, bool) {
        let of =
            |role| (matches!(role, Role::Prefill | Role::Mixed), matches!(role, Role::Decode | Role::Mixed));
        let (now, next) = (of(self.role), of(self.pending.map_or(self.role, |(role, _)| role)));
        match self.phase {
            _ if !self.alive => (false, false),
            Phase::Loading | Phase::Waiting => (false, false),
            Phase::Ready => now,
            Phase::Switching | Phase::Draining => (now.0 && next.0, now.1 && next.1),
        }
    }
}

/// How long it waits for the answer to a call, and for a silent controller.
pub(crate) fn patience(lease: Duration) -> u64 {
    u64::try_from(lease.as_millis()).expect("a short time") / 3
}
