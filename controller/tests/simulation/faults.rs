//! What goes wrong, and how it is mended.

use baton_proto::{Phase, Role, RoleEpoch};
use rand::{RngExt, rngs::StdRng};

use crate::{
    checks::Circles,
    controller::Said,
    instance::{Heard, Process},
    store::millis,
    world::{Happening, NAMES, Timer, World},
};

/// What is mended after a while.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// A controller does nothing, of a life.
    Paused(usize, u64),
    Down(usize),
    Frozen(u64),
    Obstinate(u64),
    Wedged(u64),
    /// An instance whose process has ended: where the next one starts.
    Ended {
        name: usize,
        address: u64,
        build: u8,
    },
    Refused,
}

/// How the store and the network are, until when.
#[derive(Debug)]
pub(crate) struct Weather {
    /// Nothing happens to instances but that connections are cut.
    pub(crate) gentle: bool,
    pub(crate) groups: usize,
    outage: u64,
    apart: [u64; 3],
    slow: u64,
    lossy: u64,
    slow_lines: u64,
    over: bool,
}

/// What becomes of a call of the store.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fate {
    /// When it arrives; none = never.
    pub(crate) there: Option<u64>,
    pub(crate) back: Option<u64>,
    /// It may have arrived, as far as the caller can know.
    pub(crate) doubtful: bool,
    pub(crate) error_after: Option<u64>,
}

impl Weather {
    pub(crate) fn new(random: &mut StdRng) -> Self {
        let (gentle, groups) = (random.random_bool(0.3), random.random_range(1..=2));
        Self { gentle, groups, outage: 0, apart: [0; 3], slow: 0, lossy: 0, slow_lines: 0, over: false }
    }

    pub(crate) fn fate(&self, now: u64, seat: usize, txn: bool, random: &mut StdRng) -> Fate {
        let (there, back) = (random.random_range(1..10), random.random_range(1..10));
        let arrives = |there, back| Fate { there, back, doubtful: false, error_after: None };
        if now < self.outage || now < self.apart[seat] {
            if txn && random.random_bool(0.3) {
                // On its way when it happened: it may come through when it is over, or never.
                let late = random.random_bool(0.5).then(|| random.random_range(1..8_000));
                return Fate { doubtful: true, ..arrives(late, None) };
            }
            let soon = Some(random.random_range(1..2_000));
            return Fate { error_after: soon, ..arrives(None, None) };
        }
        if now < self.lossy && random.random_bool(0.4) {
            let late = if random.random_bool(0.5) { there } else { random.random_range(1..6_000) };
            return arrives(Some(late), None);
        }
        if now < self.slow {
            return arrives(Some(random.random_range(1..1_500)), Some(random.random_range(1..1_500)));
        }
        arrives(Some(there), Some(back))
    }

    pub(crate) fn delay(&self, now: u64, random: &mut StdRng) -> u64 {
        if now < self.slow_lines { random.random_range(1..2_000) } else { random.random_range(1..15) }
    }

    fn clear(&mut self) {
        (self.outage, self.apart, self.slow, self.lossy, self.slow_lines) = (0, [0; 3], 0, 0, 0);
        self.over = true;
    }
}

impl World {
    pub(crate) fn begin(&mut self) {
        let first = self.random.random_range(1..=NAMES.len());
        for name in 0..first {
            self.start(name);
        }
        self.later(2_000, Happening::Fault);
    }

    pub(crate) fn group(&self, name: usize) -> &'static str {
        ["default", "other"][name % self.weather.groups]
    }

    fn start(&mut self, name: usize) {
        let address = self.incarnation;
        let build = u8::from(self.random.random_bool(0.1));
        self.start_at(name, address, build);
    }

    /// Starts a process, whose clock may have been set back.
    fn start_at(&mut self, name: usize, address: u64, build: u8) {
        self.incarnation += 10;
        let back = if self.random.random_bool(0.1) { 500 } else { 0 };
        let mut process = Process::new(name, self.incarnation - back, address);
        (process.supervised, process.build) = (true, build);
        let pid = self.incarnation;
        self.processes.insert(pid, process);
        for (timer, soonest, latest) in
            [(Timer::Call, 1, 300), (Timer::Beat, 100, 400), (Timer::GoOn, 200, 6_000)]
        {
            let after = self.random.random_range(soonest..latest);
            self.later(after, Happening::Timer(pid, timer));
        }
    }

    /// One of the processes that live.
    fn any(&mut self) -> Option<u64> {
        let live: Vec<u64> =
            self.processes.iter().filter(|(_, process)| process.alive).map(|(pid, _)| *pid).collect();
        (!live.is_empty()).then(|| live[self.random.random_range(0..live.len())])
    }

    pub(crate) fn fault(&mut self) {
        if self.weather.over {
            return;
        }
        let next = self.random.random_range(100..6_000);
        self.later(next, Happening::Fault);
        let seat = self.random.random_range(0..self.seats.len());
        let time = self.random.random_range(200..10_000);
        match self.random.random_range(0..if self.weather.gentle { 13 } else { 27 }) {
            0 | 1 => self.pause(seat, time),
            2 => self.down(seat, time, false),
            3 => self.down(seat, time, true),
            4 => self.weather.outage = self.now + time,
            5 => self.weather.apart[seat] = self.now + time,
            6 => self.weather.slow = self.now + time,
            7 | 8 => self.weather.lossy = self.now + time,
            9 => self.weather.slow_lines = self.now + time / 2,
            10 | 11 => {
                if let Some(pid) = self.any() {
                    self.cut(pid);
                }
            }
            12 | 13 => {
                let name = self.random.random_range(0..NAMES.len());
                if !self.live().any(|process| process.name == name) {
                    self.start(name);
                }
            }
            14..17 => {
                if let Some(pid) = self.any() {
                    self.end(pid, false);
                    self.start_again(pid, time);
                }
            }
            17 => {
                if let Some(pid) = self.any() {
                    self.end(pid, true);
                }
            }
            18 | 19 => {
                if let Some(pid) = self.any() {
                    self.process(pid).frozen = true;
                    self.later(time * 2, Happening::Mend(Fault::Frozen(pid)));
                }
            }
            20 => {
                if let Some(pid) = self.any() {
                    self.process(pid).obstinate = true;
                    self.later(time * 2, Happening::Mend(Fault::Obstinate(pid)));
                }
            }
            21..24 => {
                if let Some(pid) = self.any() {
                    self.process(pid).wedged = true;
                    self.note(|| format!("process {pid} is wedged"));
                    self.later(time * 2, Happening::Mend(Fault::Wedged(pid)));
                }
            }
            24 => self.twin(),
            25 => {
                let name = NAMES[self.random.random_range(0..NAMES.len())];
                let kind = ["instances", "roles", "status", "health"][self.random.random_range(0..4)];
                self.keeper.refuses = Some(format!("/baton/v1/{kind}/{name}"));
                self.later(time, Happening::Mend(Fault::Refused));
            }
            _ => {
                if let Some(pid) = self.any() {
                    self.end(pid, false);
                }
            }
        }
    }

    fn pause(&mut self, seat: usize, time: u64) {
        let (now, it) = (self.now, &mut self.seats[seat]);
        if it.controller.is_some() && it.paused_at.is_none() {
            it.paused_at = Some(now);
            let fault = Fault::Paused(seat, it.life);
            self.note(|| format!("c{seat} is paused"));
            self.later(time, Happening::Mend(fault));
        }
    }

    fn down(&mut self, seat: usize, time: u64, in_order: bool) {
        let it = &mut self.seats[seat];
        if it.paused_at.is_some() {
            return;
        }
        let Some(controller) = &it.controller else { return };
        if in_order {
            controller.resign();
            self.send_requests(seat);
        }
        self.seats[seat].controller = None;
        self.note(|| format!("c{seat} ends"));
        let lines = self.processes.values().filter_map(|process| Some(process.line?.0));
        let lines: Vec<u64> = lines.filter(|line| self.lines[line].seat == seat).collect();
        for line in lines {
            self.send(line, Happening::ToInstance(line, Heard::End));
        }
        self.later(time, Happening::Mend(Fault::Down(seat)));
    }

    /// Each side notices in its own time.
    fn cut(&mut self, pid: u64) {
        let Some((line, _)) = self.process(pid).line else { return };
        self.note(|| format!("line {line} is cut"));
        self.lines.get_mut(&line).expect("it stands").cut = true;
        let lease = millis(self.config.sessions.lease);
        let (one, other) = (self.random.random_range(1..=lease / 3), self.random.random_range(1..2 * lease));
        self.later(one, Happening::ToInstance(line, Heard::End));
        self.later(other, Happening::ToController(line, Said::Closed));
    }

    /// Ends a process, with a goodbye or without.
    pub(crate) fn end(&mut self, pid: u64, goodbye: bool) {
        self.note(|| format!("process {pid} ends"));
        let process = self.process(pid);
        process.alive = false;
        let Some((line, _)) = process.line.take() else { return };
        if goodbye {
            self.send(line, Happening::ToController(line, Said::Bye));
        } else if self.random.random_bool(0.8) {
            self.send(line, Happening::ToController(line, Said::Closed));
        } else {
            // The machine is gone: nothing says so.
            self.lines.get_mut(&line).expect("it stands").cut = true;
        }
    }

    /// Of the same instance: at the same address, or elsewhere.
    pub(crate) fn start_again(&mut self, pid: u64, after: u64) {
        // Perhaps of another build, which may not understand the caches of the one before.
        let (name, mut build) = (self.process(pid).name, self.process(pid).build);
        if self.random.random_bool(0.25) {
            build = if self.random.random_bool(0.5) {
                build ^ 1
            } else {
                build & 1 | self.random.random_range(0..4) << 1
            };
        }
        let elsewhere = self.random.random_bool(0.4);
        let address = if elsewhere { self.incarnation + 1 } else { self.process(pid).address };
        self.later(after, Happening::Mend(Fault::Ended { name, address, build }));
    }

    /// Somebody starts another process by the name of one that lives.
    fn twin(&mut self) {
        let Some(pid) = self.any() else { return };
        let (name, build) = (self.process(pid).name, self.process(pid).build);
        self.start_at(name, self.incarnation + 1, build);
        let twin = self.incarnation;
        self.process(twin).supervised = false;
    }

    pub(crate) fn mend(&mut self, fault: Fault) {
        match fault {
            Fault::Paused(seat, life) if self.seats[seat].life == life => {
                self.seats[seat].paused_at = None;
                self.step(seat);
            }
            Fault::Paused(..) => {}
            Fault::Down(seat) => {
                if self.seats[seat].controller.is_none() {
                    self.seat(seat);
                }
            }
            Fault::Frozen(pid) => {
                self.process(pid).frozen = false;
                for (line, heard) in std::mem::take(&mut self.process(pid).held) {
                    self.hear(line, heard);
                }
            }
            Fault::Wedged(pid) => self.process(pid).wedged = false,
            Fault::Obstinate(pid) => self.process(pid).obstinate = false,
            Fault::Ended { name, address, build } => {
                if !self.live().any(|process| process.name == name) {
                    self.start_at(name, address, build);
                }
            }
            Fault::Refused => self.keeper.refuses = None,
        }
    }

    pub(crate) fn mend_everything(&mut self) {
        self.weather.clear();
        self.keeper.refuses = None;
        for seat in 0..self.seats.len() {
            self.mend(Fault::Paused(seat, self.seats[seat].life));
            self.mend(Fault::Down(seat));
        }
        for pid in self.processes.keys().copied().collect::<Vec<_>>() {
            self.mend(Fault::Obstinate(pid));
            self.mend(Fault::Wedged(pid));
            self.mend(Fault::Frozen(pid));
        }
    }

    pub(crate) fn process(&mut self, pid: u64) -> &mut Process {
        self.processes.get_mut(&pid).expect("it was started")
    }

    /// What every party of every group serves; `moved`: an instance that has begun to leave its role.
    pub(crate) fn check_service(&mut self, moved: Option<u64>) {
        let (mut ready, mut on_their_way) = (Circles::new(), Circles::new());
        let group = |process: &Process| process.name % self.weather.groups;
        for process in self.processes.values() {
            let (serves, arrived) = (process.serves(), process.phase == Phase::Ready);
            let protocols = process.protocols();
            for version in protocols.oldest()..=protocols.newest() {
                for (circles, counts) in [(&mut ready, arrived), (&mut on_their_way, true)] {
                    let circle = (group(process), process.build & 1, version);
                    let all = circles.entry(circle).or_default();
                    *all = (all.0 || serves.0 && counts, all.1 || serves.1 && counts);
                }
            }
        }
        let moved = moved.filter(|_| self.weather.gentle).map(|pid| group(&self.processes[&pid]));
        self.findings.serving(&ready, &on_their_way, moved, self.now);
    }

    /// No instance has taken on what was never stored.
    pub(crate) fn check_held(&mut self, pid: u64) {
        let process = &self.processes[&pid];
        let (name, role, epoch) = (NAMES[process.name], process.role, process.epoch);
        let desired = baton_registry::DesiredRole {
            role,
            epoch,
            reason: String::new(),
            leader_epoch: baton_proto::LeaderEpoch(0),
            drain: None,
            cordoned: false,
        };
        let idle = (role, epoch, process.phase) == (Role::None, RoleEpoch(0), Phase::Waiting);
        if !idle
            && process.phase == Phase::Ready
            && !self.keeper.was_stored(format!("/baton/v1/roles/{name}"), &desired)
        {
            self.findings.violated(format!("{name} holds {role:?} under {epoch}, which was never stored"));
        }
    }
}
