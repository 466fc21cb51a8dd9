//! Performs what the [role machine](crate::role) decides, and shows its view to everyone else.
//!
//! Started once by [`crate::instance`]; told of assignments by [`crate::session`], of loading and stopping by the
//! instance. Drains wait for [`Permits`]; at a drain's deadline what still runs is failed, what is being handed on included.

use std::time::Duration;

use baton_process::{Health, HealthHandle};
use baton_proto::{ApiError, ErrorCode};
use futures::future::{BoxFuture, OptionFuture};
use tokio::sync::{mpsc, watch};

use crate::{
    engine::thread::Command,
    permits::Permits,
    role::{Action, Event, Phase, RoleMachine, RoleView},
};

/// Events that may wait; whoever brings more waits.
pub const EVENT_QUEUE: usize = 64;

/// After a drain's deadline, how long the last transfers may take to let go of their blocks.
pub const FENCES_WITHIN: Duration = Duration::from_secs(5);

/// How often legs are failed meanwhile: some may still come that are to hand on what is here.
const FAIL_EVERY: Duration = Duration::from_millis(500);

/// See the module.
#[derive(Debug)]
pub struct Duty {
    pub events: mpsc::Receiver<Event>,
    pub view: watch::Sender<RoleView>,
    pub permits: Permits,
    pub engine: mpsc::Sender<Command>,
    pub health: HealthHandle,
}

impl Duty {
    /// Runs until a `Stop` event's drain is over, or every sender of events is gone.
    pub async fn run(mut self) {
        let mut machine = RoleMachine::default();
        let mut drain: OptionFuture<BoxFuture<'static, ()>> = None.into();
        let mut stopping = false;
        loop {
            self.show(machine.view(), stopping);
            let event = tokio::select! {
                biased;
                Some(()) = &mut drain => {
                    drain = None.into();
                    if stopping {
                        return;
                    }
                    Event::Drained
                }
                event = self.events.recv() => match event {
                    Some(event) => event,
                    None => return,
                },
            };
            stopping |= matches!(event, Event::Stop { .. });
            match machine.on(event) {
                Some(Action::Drain { within }) => {
                    self.show(machine.view(), stopping);
                    drain = Some(self.drain(within)).into();
                }
                Some(Action::KeepOn) => drain = None.into(),
                Some(Action::TakeOn(role)) => {
                    self.show(machine.view(), stopping);
                    // The KV pool and the engine are the same for every role: there is nothing to prepare.
                    tracing::info!(?role, "taking on a role");
                    machine.on(Event::TakenOn);
                }
                None => {}
            }
        }
    }

    fn drain(&self, within: Duration) -> BoxFuture<'static, ()> {
        let (permits, engine) = (self.permits.clone(), self.engine.clone());
        Box::pin(async move {
            tracing::info!(legs = permits.taken(), ?within, "draining");
            if tokio::time::timeout(within, permits.none_taken()).await.is_ok() {
                return;
            }
            tracing::warn!(legs = permits.taken(), "the drain's time is over: failing what still runs");
            let error =
                ApiError::new(ErrorCode::Unavailable, "the instance had to stop before the request was done");
            let fail_all = async {
                loop {
                    let _ = engine.send(Command::FailAll(error.clone())).await;
                    if tokio::time::timeout(FAIL_EVERY, permits.none_taken()).await.is_ok() {
                        return;
                    }
                }
            };
            if tokio::time::timeout(FENCES_WITHIN, fail_all).await.is_err() {
                tracing::error!(legs = permits.taken(), "some legs hold on to their blocks");
            }
        })
    }

    fn show(&self, view: RoleView, stopping: bool) {
        self.health.set(match view.phase {
            Phase::Loading => Health::NotReady(format!("loading the model: {}%", view.load_permille / 10)),
            _ if stopping => Health::Draining,
            // Whoever runs it sees by that which can be ended. One that merely has no role is ready to be given one.
            _ if view.is_out_of_service() => Health::NotReady("cordoned: it serves nothing".to_owned()),
            _ => Health::Ready,
        });
        self.view.send_if_modified(|shown| {
            let changed = *shown != view;
            if changed && (shown.phase, shown.role, shown.epoch) != (view.phase, view.role, view.epoch) {
                tracing::info!(role = ?view.role, epoch = %view.epoch, phase = ?view.phase, "role changed");
            }
            *shown = view;
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::role::{Assignment, Role};
    use baton_proto::RoleEpoch;

    fn assign(role: Role, epoch: u64, drain: Duration) -> Event {
        Event::Assigned(Assignment { role, epoch: RoleEpoch(epoch), drain, cordoned: false })
    }

    struct Rig {
        events: mpsc::Sender<Event>,
        view: watch::Receiver<RoleView>,
        permits: Permits,
        commands: mpsc::Receiver<Command>,
        health: HealthHandle,
        done: tokio::task::JoinHandle<()>,
    }

    fn rig() -> Rig {
        let (events, incoming) = mpsc::channel(EVENT_QUEUE);
        let (view, shown) = watch::channel(RoleView::default());
        let (engine, commands) = mpsc::channel(8);
        let permits = Permits::default();
        let health = HealthHandle::default();
        let duty = Duty { events: incoming, view, permits: permits.clone(), engine, health: health.clone() };
        Rig { events, view: shown, permits, commands, health, done: tokio::spawn(duty.run()) }
    }

    impl Rig {
        async fn tell(&self, event: Event) {
            self.events.send(event).await.expect("the duty runs");
        }

        async fn until(&mut self, role: Role, phase: Phase) {
            self.view.wait_for(|view| view.role == role && view.phase == phase).await.expect("the duty runs");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_switch_waits_for_the_last_leg() {
        let mut rig = rig();
        rig.tell(Event::Loaded).await;
        rig.tell(assign(Role::Prefill, 1, Duration::ZERO)).await;
        rig.until(Role::Prefill, Phase::Ready).await;
        let permit = rig.permits.take();
        rig.tell(assign(Role::Decode, 2, Duration::from_secs(60))).await;
        rig.until(Role::Prefill, Phase::Draining).await;
        drop(permit);
        rig.until(Role::Decode, Phase::Ready).await;
        assert!(rig.commands.try_recv().is_err(), "legs were failed before the deadline");
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_that_is_taken_back_fails_no_leg() {
        let mut rig = rig();
        rig.tell(Event::Loaded).await;
        rig.tell(assign(Role::Prefill, 1, Duration::ZERO)).await;
        rig.until(Role::Prefill, Phase::Ready).await;
        let _permit = rig.permits.take();
        rig.tell(assign(Role::Decode, 2, Duration::from_secs(60))).await;
        rig.until(Role::Prefill, Phase::Draining).await;
        rig.tell(assign(Role::Prefill, 3, Duration::from_secs(60))).await;
        rig.view.wait_for(|view| view.epoch == RoleEpoch(3)).await.expect("the duty runs");
        rig.until(Role::Prefill, Phase::Ready).await;
        let deadline = tokio::time::timeout(Duration::from_secs(600), rig.commands.recv()).await;
        assert!(deadline.is_err(), "legs were failed for a switch that was taken back");
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_is_given_more_time_while_it_runs() {
        const MINUTE: Duration = Duration::from_secs(60);
        let mut rig = rig();
        rig.tell(Event::Loaded).await;
        rig.tell(assign(Role::Prefill, 1, Duration::ZERO)).await;
        rig.until(Role::Prefill, Phase::Ready).await;
        let _permit = rig.permits.take();
        rig.tell(assign(Role::None, 2, MINUTE)).await;
        rig.until(Role::Prefill, Phase::Draining).await;
        tokio::time::sleep(MINUTE / 2).await;
        let given = tokio::time::Instant::now();
        rig.tell(assign(Role::None, 3, MINUTE * 10)).await;
        assert!(matches!(rig.commands.recv().await, Some(Command::FailAll(_))));
        assert_eq!(given.elapsed().as_secs(), 600);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_cordoned_is_not_ready_once_it_is_drained() {
        let mut rig = rig();
        let cordoned = |role, epoch, cordoned| {
            let drain = Duration::from_secs(60);
            Event::Assigned(Assignment { role, epoch: RoleEpoch(epoch), drain, cordoned })
        };
        rig.tell(Event::Loaded).await;
        rig.until(Role::None, Phase::Waiting).await;
        assert!(rig.health.is_ready(), "it waits for its first role");
        rig.tell(assign(Role::Prefill, 1, Duration::ZERO)).await;
        rig.until(Role::Prefill, Phase::Ready).await;
        let permit = rig.permits.take();
        rig.tell(cordoned(Role::None, 2, true)).await;
        rig.until(Role::Prefill, Phase::Draining).await;
        assert!(rig.health.is_ready(), "it works on");
        drop(permit);
        rig.until(Role::None, Phase::Ready).await;
        assert_eq!(rig.health.get().describe(), "cordoned: it serves nothing");
        assert!(!rig.health.is_ready());
        // Back in service, with nobody that it could serve with.
        rig.tell(cordoned(Role::None, 3, false)).await;
        rig.view.wait_for(|view| view.epoch == RoleEpoch(3)).await.expect("the duty runs");
        assert!(rig.health.is_ready());
        rig.tell(cordoned(Role::None, 4, true)).await;
        rig.view.wait_for(|view| view.epoch == RoleEpoch(4)).await.expect("the duty runs");
        assert!(!rig.health.is_ready());
        rig.tell(assign(Role::Decode, 5, Duration::ZERO)).await;
        rig.until(Role::Decode, Phase::Ready).await;
        assert!(rig.health.is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn what_outlasts_the_deadline_is_failed() {
        let mut rig = rig();
        rig.tell(Event::Loaded).await;
        rig.tell(assign(Role::Prefill, 1, Duration::ZERO)).await;
        rig.until(Role::Prefill, Phase::Ready).await;
        let permit = rig.permits.take();
        rig.tell(Event::Stop { drain: Duration::from_secs(60) }).await;
        assert!(matches!(rig.commands.recv().await, Some(Command::FailAll(_))));
        // One that came while it drained, to hand on what is here, and a moment too late.
        let late = rig.permits.take();
        drop(permit);
        assert!(matches!(rig.commands.recv().await, Some(Command::FailAll(_))));
        drop(late);
        let over = tokio::time::Instant::now();
        rig.done.await.expect("the duty ends");
        assert!(over.elapsed() < FENCES_WITHIN);
    }
}
