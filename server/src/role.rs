//! Which role this instance has, and how it changes. Pure: events in, at most one action out.
//!
//! ```text
//! Loading ──loaded──> Waiting ──assigned──> Switching ──taken on──> Ready
//!    └──loaded, assigned before──────────────^   ^                  ^ │ assigned another role
//!                                                └───drained─── Draining
//! ```
//! An assignment counts only if its epoch is above every one seen before; the last one wins, also while an earlier one
//! is still being taken on. The held role under a new epoch needs no drain, and takes back one that is under way.
//! Stopping drains for good.

use std::time::Duration;

use baton_proto::RoleEpoch;
pub use baton_proto::{Phase, Role};

/// What others are told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoleView {
    pub role: Role,
    pub epoch: RoleEpoch,
    pub phase: Phase,
    /// Of the weights, while loading.
    pub load_permille: u32,
    /// It has no role because it was taken out of service.
    pub cordoned: bool,
}

/// A controller's wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assignment {
    pub role: Role,
    pub epoch: RoleEpoch,
    /// How long running requests may take to finish first.
    pub drain: Duration,
    /// No role, because it is taken out of service.
    pub cordoned: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Progress {
        permille: u32,
    },
    Loaded,
    Assigned(Assignment),
    /// Nothing runs any more.
    Drained,
    /// The new role's preparations are done.
    TakenOn,
    /// The process is to end.
    Stop {
        drain: Duration,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Let what runs finish, end it after that time, and report `Drained`.
    Drain { within: Duration },
    /// Drain no more: the role is kept.
    KeepOn,
    /// Prepare for the role, and report `TakenOn`.
    TakeOn(Role),
}

/// See the module.
#[derive(Debug, Default)]
pub struct RoleMachine {
    view: RoleView,
    /// Assigned and not taken on yet.
    pending: Option<Assignment>,
    stopping: bool,
}

impl RoleMachine {
    pub fn view(&self) -> RoleView {
        self.view
    }

    pub fn on(&mut self, event: Event) -> Option<Action> {
        match event {
            Event::Progress { permille } => {
                if self.view.phase == Phase::Loading {
                    self.view.load_permille = permille.min(1000);
                }
                None
            }
            Event::Loaded if self.view.phase == Phase::Loading => {
                self.view.load_permille = 1000;
                self.view.phase = Phase::Waiting;
                self.switch()
            }
            Event::Assigned(assignment) => self.assigned(assignment),
            Event::Drained if self.view.phase == Phase::Draining && !self.stopping => self.switch(),
            Event::TakenOn if self.view.phase == Phase::Switching => {
                let taken = self.pending.take()?;
                (self.view.role, self.view.epoch, self.view.phase) = (taken.role, taken.epoch, Phase::Ready);
                self.view.cordoned = taken.cordoned;
                None
            }
            Event::Stop { drain } if !self.stopping => {
                self.stopping = true;
                self.view.phase = Phase::Draining;
                Some(Action::Drain { within: drain })
            }
            Event::Loaded | Event::Drained | Event::TakenOn | Event::Stop { .. } => None,
        }
    }

    fn assigned(&mut self, assignment: Assignment) -> Option<Action> {
        let newest = self.pending.map_or(self.view.epoch, |pending| pending.epoch);
        if assignment.epoch <= newest || self.stopping {
            return None;
        }
        match self.view.phase {
            Phase::Ready if assignment.role == self.view.role => {
                (self.view.epoch, self.view.cordoned) = (assignment.epoch, assignment.cordoned);
                None
            }
            Phase::Ready => {
                self.pending = Some(assignment);
                self.view.phase = Phase::Draining;
                Some(Action::Drain { within: assignment.drain })
            }
            Phase::Waiting => {
                self.pending = Some(assignment);
                self.switch()
            }
            // The role it still holds: the drain is taken back.
            Phase::Draining if assignment.role == self.view.role => {
                self.pending = None;
                (self.view.epoch, self.view.phase) = (assignment.epoch, Phase::Ready);
                self.view.cordoned = assignment.cordoned;
                Some(Action::KeepOn)
            }
            // What is under way goes on and ends in the newest assignment, in the time that this one gives it.
            Phase::Draining => {
                let before = self.pending.replace(assignment);
                let anew = before.is_none_or(|before| before.drain != assignment.drain);
                anew.then_some(Action::Drain { within: assignment.drain })
            }
            Phase::Loading => {
                self.pending = Some(assignment);
                None
            }
            Phase::Switching => {
                self.pending = Some(assignment);
                Some(Action::TakeOn(assignment.role))
            }
        }
    }

    fn switch(&mut self) -> Option<Action> {
        let pending = self.pending?;
        self.view.phase = Phase::Switching;
        Some(Action::TakeOn(pending.role))
    }
}

impl RoleView {
    /// Whether it is out of service, with nothing left to do.
    pub fn is_out_of_service(self) -> bool {
        self.cordoned && self.role == Role::None && self.phase == Phase::Ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DRAIN: Duration = Duration::from_secs(1);

    fn assign(role: Role, epoch: u64) -> Event {
        Event::Assigned(Assignment { role, epoch: RoleEpoch(epoch), drain: DRAIN, cordoned: false })
    }

    fn state(machine: &RoleMachine) -> (Role, u64, Phase) {
        (machine.view.role, machine.view.epoch.0, machine.view.phase)
    }

    fn ready(role: Role, epoch: u64) -> RoleMachine {
        let mut machine = RoleMachine::default();
        machine.on(assign(role, epoch));
        assert_eq!(machine.on(Event::Loaded), Some(Action::TakeOn(role)));
        assert_eq!(machine.on(Event::TakenOn), None);
        assert_eq!(state(&machine), (role, epoch, Phase::Ready));
        machine
    }

    #[test]
    fn loads_waits_and_takes_on() {
        let mut machine = RoleMachine::default();
        machine.on(Event::Progress { permille: 500 });
        assert_eq!(machine.view().load_permille, 500);
        assert_eq!(machine.on(Event::Loaded), None);
        assert_eq!(state(&machine), (Role::None, 0, Phase::Waiting));
        assert_eq!(machine.on(assign(Role::Decode, 3)), Some(Action::TakeOn(Role::Decode)));
        machine.on(Event::TakenOn);
        assert_eq!(state(&machine), (Role::Decode, 3, Phase::Ready));
    }

    #[test]
    fn drains_before_it_switches() {
        let mut machine = ready(Role::Prefill, 1);
        assert_eq!(machine.on(assign(Role::Decode, 2)), Some(Action::Drain { within: DRAIN }));
        assert_eq!(state(&machine), (Role::Prefill, 1, Phase::Draining));
        assert_eq!(machine.on(assign(Role::Mixed, 4)), None);
        assert_eq!(machine.on(assign(Role::Decode, 3)), None, "older than the pending one");
        assert_eq!(machine.on(Event::Drained), Some(Action::TakeOn(Role::Mixed)));
        machine.on(Event::TakenOn);
        assert_eq!(state(&machine), (Role::Mixed, 4, Phase::Ready));
    }

    #[test]
    fn a_drain_that_is_given_another_time_begins_anew() {
        let mut machine = ready(Role::Prefill, 1);
        assert_eq!(machine.on(assign(Role::None, 2)), Some(Action::Drain { within: DRAIN }));
        let longer = Assignment { role: Role::None, epoch: RoleEpoch(3), drain: DRAIN * 2, cordoned: true };
        assert_eq!(machine.on(Event::Assigned(longer)), Some(Action::Drain { within: DRAIN * 2 }));
        assert_eq!(machine.on(Event::Assigned(Assignment { epoch: RoleEpoch(4), ..longer })), None);
        assert_eq!(machine.on(Event::Drained), Some(Action::TakeOn(Role::None)));
    }

    #[test]
    fn the_same_role_under_a_new_epoch_goes_on_at_once() {
        let mut machine = ready(Role::Prefill, 1);
        assert_eq!(machine.on(assign(Role::Prefill, 2)), None);
        assert_eq!(state(&machine), (Role::Prefill, 2, Phase::Ready));
        assert_eq!(machine.on(assign(Role::Decode, 2)), None);
        assert_eq!(state(&machine), (Role::Prefill, 2, Phase::Ready));
    }

    #[test]
    fn a_drain_is_taken_back_when_the_held_role_is_assigned_again() {
        let mut machine = ready(Role::Prefill, 1);
        assert_eq!(machine.on(assign(Role::Decode, 2)), Some(Action::Drain { within: DRAIN }));
        assert_eq!(machine.on(assign(Role::Prefill, 3)), Some(Action::KeepOn));
        assert_eq!(state(&machine), (Role::Prefill, 3, Phase::Ready));
        assert_eq!(machine.on(Event::Drained), None, "of the drain that was taken back");
        assert_eq!(state(&machine), (Role::Prefill, 3, Phase::Ready));
    }

    #[test]
    fn stopping_is_final() {
        let mut machine = ready(Role::Decode, 1);
        assert_eq!(machine.on(Event::Stop { drain: DRAIN }), Some(Action::Drain { within: DRAIN }));
        assert_eq!(machine.on(assign(Role::Prefill, 2)), None);
        assert_eq!(machine.on(Event::Drained), None);
        assert_eq!(state(&machine), (Role::Decode, 1, Phase::Draining));
    }

    proptest! {
        #[test]
        fn epochs_only_grow_and_the_newest_assignment_is_reached(
            events in prop::collection::vec((0u8..4, 1u64..20, 0u8..4), 0..60),
        ) {
            let roles = [Role::None, Role::Prefill, Role::Decode, Role::Mixed];
            let mut machine = RoleMachine::default();
            let (mut newest, mut taking_on) = ((0, Role::None), None);
            for (what, epoch, role) in events {
                let role = roles[usize::from(role)];
                let before = machine.view().epoch;
                let action = machine.on(match what {
                    0 => assign(role, epoch),
                    1 => Event::Loaded,
                    2 => Event::Drained,
                    _ => Event::TakenOn,
                });
                if what == 0 && epoch > newest.0 {
                    newest = (epoch, role);
                }
                if let Some(Action::TakeOn(role)) = action {
                    taking_on = Some(role);
                }
                prop_assert!(machine.view().epoch >= before);
                if machine.view().phase == Phase::Switching {
                    prop_assert_eq!(machine.pending.map(|pending| pending.role), taking_on);
                }
            }
            for event in [Event::Loaded, Event::Drained, Event::TakenOn] {
                machine.on(event);
            }
            prop_assert_eq!((machine.view().epoch.0, machine.view().role), newest);
        }
    }
}
