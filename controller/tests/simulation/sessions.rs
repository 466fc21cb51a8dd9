//! The instances' side of the world: calls, beats, orders and what they lead to.

use baton_controller::{fleet::SessionId, reconcile::Order};
use baton_proto::Phase;
use rand::RngExt;

use crate::{
    controller::{Out, Said},
    instance::{Heard, Next, patience},
    store::millis,
    world::{Happening, NAMES, Timer, World},
};

impl World {
    pub(crate) fn timer(&mut self, pid: u64, timer: Timer) {
        let (now, lease) = (self.now, self.config.sessions.lease);
        let process = self.process(pid);
        if !process.alive {
            return;
        }
        if process.frozen {
            return self.later(50, Happening::Timer(pid, timer));
        }
        match timer {
            Timer::Call if process.line.is_none() => self.call(pid),
            Timer::Call => {}
            Timer::Unanswered(line) => {
                if process.line == Some((line, false)) {
                    self.give_up(pid, line);
                }
            }
            Timer::Beat => {
                let line = process.line;
                self.later(millis(self.config.sessions.beat), Happening::Timer(pid, Timer::Beat));
                if let Some((line, true)) = line {
                    // Its pings are not answered.
                    let paused = self.seats[self.lines[&line].seat].paused_at;
                    if paused.is_some_and(|since| now >= since + patience(lease)) {
                        return self.give_up(pid, line);
                    }
                    self.report(pid);
                }
            }
            Timer::GoOn if process.obstinate && process.phase == Phase::Draining => {
                self.later(200, Happening::Timer(pid, Timer::GoOn));
            }
            Timer::GoOn => {
                let next = process.go_on();
                self.next(pid, next);
            }
            Timer::TakenOn => {
                process.taken_on();
                self.check_held(pid);
                self.next(pid, Next::Nothing);
            }
        }
    }

    fn next(&mut self, pid: u64, next: Next) {
        match next {
            Next::Drain => {
                let drain = self.random.random_range(1..=millis(self.config.roles.drain));
                self.later(drain, Happening::Timer(pid, Timer::GoOn));
            }
            Next::TakeOn => {
                let time = self.random.random_range(1..200);
                self.later(time, Happening::Timer(pid, Timer::TakenOn));
            }
            Next::Nothing => {}
        }
        self.check_service((next == Next::Drain).then_some(pid));
        self.report(pid);
    }

    /// A beat, if it has a session.
    fn report(&mut self, pid: u64) {
        let process = self.process(pid);
        let beat = process.beat();
        if let Some((line, true)) = process.line {
            self.send(line, Happening::ToController(line, Said::Beat(beat)));
        }
    }

    fn call(&mut self, pid: u64) {
        let seats = self.seats.len();
        let process = self.process(pid);
        if process.left == 0 {
            process.left = seats;
        }
        (process.left, process.calls) = (process.left - 1, process.calls + 1);
        let seat = process.calls % seats;
        let line = self.connect(pid, seat);
        let (name, group) = (self.processes[&pid].name, self.group(self.processes[&pid].name));
        let process = self.process(pid);
        process.line = Some((line, false));
        let hello = Said::Hello(Box::new(process.spec(NAMES[name], group)), process.beat());
        self.send(line, Happening::ToController(line, hello));
        self.later(patience(self.config.sessions.lease), Happening::Timer(pid, Timer::Unanswered(line)));
    }

    /// It ends its side of the connection.
    fn give_up(&mut self, pid: u64, line: u64) {
        if !self.lines[&line].cut {
            self.send(line, Happening::ToController(line, Said::Closed));
        }
        self.broken(pid);
    }

    /// It has no session any more, and calls again.
    fn broken(&mut self, pid: u64) {
        let lease = millis(self.config.sessions.lease);
        let jitter = self.random.random_range(0.5..1.0);
        let process = self.process(pid);
        let welcomed = process.line.take().is_some_and(|(_, welcomed)| welcomed);
        let pause = if welcomed {
            (process.left, process.fruitless) = (0, 0);
            100.0 * jitter
        } else if process.left > 0 {
            5.0
        } else {
            // All have been asked, and whoever they know has not been this one: it stays as it is.
            process.settled = true;
            process.fruitless += 1;
            jitter * f64::from(100 << process.fruitless.min(6)).min(lease as f64 / 6.0).max(100.0)
        };
        self.later(pause as u64, Happening::Timer(pid, Timer::Call));
    }

    pub(crate) fn hear(&mut self, line: u64, heard: Heard) {
        let Some(it) = self.lines.get(&line) else { return };
        let (pid, cut) = (it.process, it.cut);
        let process = self.process(pid);
        let current = process.line.is_some_and(|(current, _)| current == line);
        if !process.alive || !current || (cut && !matches!(heard, Heard::End)) {
            return;
        }
        if process.frozen {
            return process.held.push((line, heard));
        }
        match heard {
            Heard::Welcome => {
                (process.line, process.settled) = (Some((line, true)), true);
                (process.left, process.fruitless) = (0, 0);
                self.report(pid);
            }
            Heard::Assign(desired) => {
                let late = desired.epoch <= process.newest();
                let next = process.assigned(&desired);
                self.findings.counts.late_orders += u64::from(late);
                self.next(pid, next);
            }
            Heard::Refuse { held } => {
                let own = process.incarnation;
                match held.map(|held| held.0).filter(|held| *held > own) {
                    Some(held) if !process.settled => {
                        (process.incarnation, process.settled) = (held + 1, true);
                        self.broken(pid);
                    }
                    Some(_) => {
                        // It has been replaced; its supervisor starts another unless somebody has.
                        self.end(pid, false);
                        self.start_again(pid, 1_000);
                    }
                    None => self.broken(pid),
                }
            }
            Heard::End => self.broken(pid),
        }
    }

    /// What a controller does to a connection.
    pub(crate) fn carry_out(&mut self, seat: usize, out: Out) {
        let (SessionId(line), heard) = match out {
            Out::Order(session, Order::Welcome) => {
                self.check_welcome(seat, session);
                self.findings.counts.welcomes += 1;
                (session, Heard::Welcome)
            }
            Out::Order(session, Order::Assign(desired)) => {
                let name = NAMES[self.processes[&self.lines[&session.0].process].name];
                let epoch = self.seats[seat].controller.as_ref().and_then(|controller| controller.epoch());
                let leads = epoch.is_some() && epoch == self.keeper.leader();
                self.note(|| format!("c{seat} tells {name} {desired:?}"));
                self.findings.told(name, &desired, leads, &self.keeper);
                (session, Heard::Assign(desired))
            }
            Out::Order(session, Order::Refuse { held, reason }) => {
                self.note(|| format!("c{seat} refuses {session}: {reason}"));
                self.findings.counts.refusals += 1;
                (session, Heard::Refuse { held })
            }
            Out::End(session) | Out::NotLeading(session) => (session, Heard::End),
        };
        self.send(line, Happening::ToInstance(line, heard));
    }

    /// No other live process of this id has a session here, or was heard within its lease.
    fn check_welcome(&mut self, seat: usize, session: SessionId) {
        let pid = self.lines[&session.0].process;
        let name = self.processes[&pid].name;
        let Some(controller) = &self.seats[seat].controller else { return };
        let (Some(leading), now) = (controller.leading(), controller.clock.at(self.now)) else { return };
        // Who leads no more is not listened to, and who has gone does not listen.
        let gone = self.processes[&pid].line.is_none_or(|(line, _)| line != session.0);
        if gone || self.keeper.leader() != controller.epoch() {
            return;
        }
        for (other, process) in &self.processes {
            if *other == pid || process.name != name || !process.alive {
                continue;
            }
            let lines = self.lines.iter().filter(|(_, line)| line.process == *other && line.seat == seat);
            for (line, _) in lines {
                let line = SessionId(*line);
                let known = leading.welcomed.get(&line).copied();
                let heard = known.is_some_and(|heard| now < heard + self.config.sessions.lease);
                if leading.mind.members().values().any(|m| m.session() == Some(line)) || heard {
                    let who = NAMES[name];
                    return self.findings.violated(format!(
                        "process {pid} of {who} is welcomed by c{seat} while process {other} is, by {line}"
                    ));
                }
            }
        }
    }
}
