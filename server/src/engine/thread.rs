//! The engine's thread: takes commands, runs steps, sends out what they bring.
//!
//! Started once by [`crate::serving`]; commanded by [`crate::inference`] (legs come and go) and [`crate::handoff`]
//! (transfers end). It blocks on nothing but the model while there is work, and on the command queue when there is
//! none. What a step brings is told in one call, which must not block either.

use std::{
    collections::HashMap,
    io,
    ops::{ControlFlow, Range},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Instant,
};

use baton_kvtransfer::Sealed;
use baton_proto::{ApiError, BlockHash, ErrorCode, LegId};
use baton_runtime::Executor;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
};
use tokio_util::sync::CancellationToken;

use super::{
    cache_events::CacheEvents,
    load::{Done, Load},
    scheduler::{Chunk, Effect, Limits, Scheduler},
    sequence::{LegUpdate, NewSequence, SequenceId, Stage, StreamId},
    step::{StepStats, Stepper},
};
use crate::{handoff::Transfers, metrics::EngineMetrics};

/// After this many steps of which the model computed nothing, one after the other, it is taken to be beyond repair: the
/// thread ends, the process with it, and whoever supervises it starts another.
const FAILED_STEPS: u32 = 16;

/// Commands that may wait for the engine; whoever sends more waits in turn.
pub const COMMAND_QUEUE: usize = 1024;

/// Most that it obeys between two steps: the rest waits for the next, lest who sends without end keep all from being
/// computed.
const COMMANDS_A_STEP: usize = 256;

/// What the engine is told.
#[derive(Debug)]
pub enum Command {
    /// Take a leg on.
    Add(Box<NewSequence>),
    /// The coordinator wants no more of these choices of a leg; if what it handed on arrived damaged, its prompt is in
    /// quarantine.
    Cancel { leg: SequenceId, choices: Range<u32>, damaged: bool },
    /// A coordinator's stream is gone.
    CancelStream(StreamId),
    /// End everything with this error.
    FailAll(ApiError),
    /// A decode leg's cache has been offered, or it has not been in time.
    Offered { id: SequenceId, result: Result<(), ApiError> },
    /// A decode leg's cache is whole; no transport touches its blocks any more.
    Received { id: SequenceId, sealed: Sealed },
    /// A transfer is over; no transport touches its blocks any more.
    TransferEnded { id: SequenceId, result: Result<(), ApiError> },
    /// Answer once the updates of all that has ended are delivered: a leg lets go of its permit before.
    Settle(oneshot::Sender<()>),
}

/// What streams are told at a time. It belongs together: the load is that after these updates and before any other.
#[derive(Debug)]
pub struct Delivery<'a> {
    pub updates: HashMap<StreamId, Vec<LegUpdate>>,
    pub load: &'a Load,
    /// The last leg of each stream that was taken on; of a stream that is not there, none was.
    pub seen: &'a HashMap<StreamId, LegId>,
}

/// Tells the streams.
pub type Deliver = Arc<dyn Fn(Delivery<'_>) + Send + Sync>;

/// Everything the engine works with.
pub struct EngineParts {
    pub executor: Box<dyn Executor>,
    pub limits: Limits,
    /// Where the hashes of the KV pool's blocks start.
    pub root: BlockHash,
    pub commands: mpsc::Receiver<Command>,
    pub transfers: Transfers,
    pub deliver: Deliver,
    pub cache_events: Arc<CacheEvents>,
    pub load: watch::Sender<Load>,
    pub metrics: EngineMetrics,
    /// Ends the thread; what is still running is failed.
    pub shutdown: CancellationToken,
    /// Where waiting is done.
    pub runtime: Handle,
    /// Dropped when the thread ends.
    pub alive: oneshot::Sender<()>,
}

/// Starts the thread. It ends after `shutdown`, if it panics, or if the model only fails any more.
pub fn spawn(parts: EngineParts) -> io::Result<JoinHandle<()>> {
    let blocks = parts.executor.kv_pool().layout().blocks;
    let engine = Engine {
        scheduler: Scheduler::new(parts.limits, blocks, parts.root),
        stepper: Stepper::new(parts.executor),
        commands: parts.commands,
        transfers: parts.transfers,
        deliver: parts.deliver,
        cache_events: parts.cache_events,
        load: parts.load,
        metrics: parts.metrics,
        shutdown: parts.shutdown,
        runtime: parts.runtime,
        not_begun: Vec::new(),
        failed_steps: 0,
        done: Done::default(),
        arrived: Vec::new(),
        settling: Vec::new(),
        seen: HashMap::new(),
        untold: false,
    };
    let alive = parts.alive;
    thread::Builder::new().name("engine".into()).spawn(move || {
        let _alive = alive;
        let runtime = engine.runtime.clone();
        let _entered = runtime.enter();
        engine.run();
    })
}

struct Engine {
    scheduler: Scheduler,
    stepper: Stepper,
    commands: mpsc::Receiver<Command>,
    transfers: Transfers,
    deliver: Deliver,
    cache_events: Arc<CacheEvents>,
    load: watch::Sender<Load>,
    metrics: EngineMetrics,
    shutdown: CancellationToken,
    runtime: Handle,
    /// Transfers that could not even begin; reported after the step that they were planned for.
    not_begun: Vec<(SequenceId, ApiError)>,
    /// Steps in a row of which the model computed nothing.
    failed_steps: u32,
    done: Done,
    /// The caches that have arrived since the last step.
    arrived: Vec<(SequenceId, Sealed)>,
    /// To be answered after the next delivery.
    settling: Vec<oneshot::Sender<()>>,
    /// The last leg taken on of each stream.
    seen: HashMap<StreamId, LegId>,
    /// A command has been obeyed and nobody told what came of it.
    untold: bool,
}

/// Why the engine woke up.
enum Woken {
    Command(Command),
    /// Everyone who could send a command is gone.
    Deserted,
    /// A deadline or shutdown.
    Other,
}

impl Engine {
    fn run(mut self) {
        self.tell(None);
        while !self.shutdown.is_cancelled() && self.failed_steps < FAILED_STEPS {
            for _ in 0..COMMANDS_A_STEP {
                let Ok(command) = self.commands.try_recv() else { break };
                self.obey(command);
            }
            let worked = self.step();
            if !worked && self.wait().is_break() {
                break;
            }
        }
        let reason = if self.failed_steps < FAILED_STEPS {
            "the instance is shutting down"
        } else {
            tracing::error!(steps = FAILED_STEPS, "the model computes nothing any more; the engine gives up");
            "the instance's model fails, and it is being restarted"
        };
        self.scheduler.fail_all(&ApiError::new(ErrorCode::Unavailable, reason));
        self.perform();
        self.tell(None);
    }

    /// Plans and computes one step. False if there is nothing to do before something happens.
    fn step(&mut self) -> bool {
        self.scheduler.expire(Instant::now());
        let plan = self.scheduler.schedule();
        // Offers go out before the first layer is computed, so that their slices can follow at once.
        self.perform();
        let (arrived, at) = (std::mem::take(&mut self.arrived), Instant::now());
        // Before it: a leg that ends with its first step is gone after that.
        for (id, sealed) in &arrived {
            self.scheduler.trace(*id, "join", sealed.last_slice_at, at);
            self.scheduler.log(*id, Stage::LastSlice, sealed.last_slice_at);
            self.scheduler.log(*id, Stage::FirstStep, at);
        }
        let stats = (!plan.is_empty()).then(|| self.compute(&plan));
        let computed = Instant::now();
        for (id, sealed) in arrived {
            self.scheduler.trace(id, "first_decode", at, computed);
            self.metrics.joined(at.saturating_duration_since(sealed.at));
        }
        let not_begun = std::mem::take(&mut self.not_begun);
        // Their blocks and places are free now: whoever waits for them is to be looked at again.
        let worked = !plan.is_empty() || !not_begun.is_empty();
        for (id, error) in not_begun {
            self.scheduler.transfer_ended(id, Err(error));
        }
        self.perform();
        self.tell(stats);
        if let Some(stats) = stats {
            self.failed_steps = if stats.failed { self.failed_steps + 1 } else { 0 };
        }
        worked
    }

    fn compute(&mut self, plan: &[Chunk]) -> StepStats {
        // Whoever watches is to see that there is work before a step that may never end, and who places requests what has
        // come since the last: a step takes longer than many of them need to be placed.
        if self.untold || self.load.borrow().occupancy.running == 0 {
            self.tell(None);
        }
        let Self { scheduler, stepper, transfers, load, done, .. } = self;
        let mut on_layer = || {
            done.progress += 1;
            // Nobody need wake up for it.
            load.send_if_modified(|load| {
                load.done.progress = done.progress;
                false
            });
        };
        stepper.run(scheduler, plan, |id| transfers.progress(id), &mut on_layer)
    }

    /// Sleeps until a command, a deadline or shutdown. Breaks when no command can come any more.
    fn wait(&mut self) -> ControlFlow<()> {
        let deadline = self.scheduler.next_deadline();
        let (commands, shutdown) = (&mut self.commands, &self.shutdown);
        let woken = self.runtime.block_on(async {
            let due = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => Woken::Other,
                command = commands.recv() => command.map_or(Woken::Deserted, Woken::Command),
                () = due => Woken::Other,
            }
        });
        match woken {
            Woken::Command(command) => self.obey(command),
            Woken::Deserted => return ControlFlow::Break(()),
            Woken::Other => {}
        }
        ControlFlow::Continue(())
    }

    fn obey(&mut self, command: Command) {
        self.untold = true;
        match command {
            Command::Add(new) => {
                let seen = self.seen.entry(new.address.stream).or_default();
                *seen = new.address.leg.max(*seen);
                self.scheduler.add(*new);
            }
            Command::Cancel { leg, choices, damaged } => {
                if damaged {
                    self.scheduler.quarantine(leg);
                }
                self.scheduler.cancel_choices(leg, choices);
            }
            Command::CancelStream(stream) => {
                self.seen.remove(&stream);
                self.scheduler.cancel_stream(stream);
            }
            Command::FailAll(error) => self.scheduler.fail_all(&error),
            Command::Settle(answer) => self.settling.push(answer),
            Command::Offered { id, result } => {
                self.transfers.unwatch(id);
                self.scheduler.offered(id, result);
            }
            Command::Received { id, sealed } => {
                self.done.transferred(self.transfers.ended(id), Ok(()));
                self.scheduler.received(id, sealed.first_tokens.as_slice());
                self.arrived.push((id, sealed));
            }
            Command::TransferEnded { id, result } => {
                self.done.transferred(self.transfers.ended(id), result.as_ref().map(drop));
                self.scheduler.transfer_ended(id, result);
            }
        }
    }

    fn perform(&mut self) {
        for effect in self.scheduler.take_effects() {
            let begun = match effect {
                Effect::Offer { id, offer } => {
                    let _traced_in = self.scheduler.span(id).entered();
                    self.transfers.offer(id, offer).map_err(|error| (id, error))
                }
                Effect::Expect { id, expect } => {
                    let _traced_in = self.scheduler.span(id).entered();
                    self.transfers.expect(id, expect).map_err(|error| (id, error))
                }
                Effect::Watch { id, transfer, deadline } => {
                    self.transfers.watch(id, transfer, deadline);
                    Ok(())
                }
                Effect::Unwatch { id } => {
                    self.transfers.unwatch(id);
                    Ok(())
                }
                Effect::Seal { id, first_tokens } => {
                    let at = Instant::now();
                    self.transfers.seal(id, first_tokens);
                    // Told after it: decode waits for nothing else.
                    self.scheduler.log(id, Stage::LastLayer, self.stepper.last_layer_at().unwrap_or(at));
                    self.scheduler.log(id, Stage::FirstToken, at);
                    Ok(())
                }
                Effect::Refuse { transfer, reason } => {
                    self.transfers.refuse(transfer, reason);
                    Ok(())
                }
                Effect::Close { id, needed } => {
                    self.transfers.close(id, needed);
                    Ok(())
                }
            };
            self.not_begun.extend(begun.err());
        }
    }

    /// Says what has come of the legs, and how busy the engine is now.
    fn tell(&mut self, stats: Option<StepStats>) {
        self.untold = false;
        let mut updates: HashMap<StreamId, Vec<LegUpdate>> = HashMap::new();
        for (address, update) in self.scheduler.take_outputs() {
            self.metrics.ended(update.end.as_ref());
            self.done.ended(update.end.as_ref());
            updates.entry(address.stream).or_default().push(update);
        }
        self.cache_events.publish(self.scheduler.take_cache_changes());
        let mut load = *self.load.borrow();
        if let Some(stats) = &stats {
            self.done.count(stats);
            load.learn(stats);
        }
        (load.occupancy, load.done) = (self.scheduler.occupancy(), self.done);
        self.metrics.observe(&load.occupancy, stats.as_ref());
        (self.deliver)(Delivery { updates, load: &load, seen: &self.seen });
        for answer in self.settling.drain(..) {
            // Whoever asked may have gone.
            let _ = answer.send(());
        }
        self.load.send_if_modified(|held| std::mem::replace(held, load) != load);
    }
}
