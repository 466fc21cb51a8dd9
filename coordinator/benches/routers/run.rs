//! The rounds: every line in turn, and in every line all that are measured, one right after the other, so that what else
//! the machine does meets them alike.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    child::Asked,
    error::BenchError,
    lines::{Answer, Line, Prompt},
    model,
    procfs::{CpuTime, forget_peak, peak_megabytes},
    protocol::{Done, FloorReady, Job, Outcome, Pace, WorkerReady, WorkerSetup},
    report::Figures,
    targets::{self, Programs, Router, Target},
    words::Words,
};

/// How long a router may take until it answers.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// Requests before anything is measured.
const WARM_UP: u32 = 256;
/// Texts that prompts are made of, where not each is to be new.
const TEXTS: u32 = 32;
/// They are written beforehand, and take some 220 KB each.
const FRESH_TEXTS_MOST: u32 = 8192;

/// What was measured, in the order of rounds.
pub(crate) type Runs = BTreeMap<(Line, Target), Vec<Figures>>;

/// What is to run.
pub(crate) struct Setup<'a> {
    pub(crate) programs: &'a Programs,
    /// Who is measured.
    pub(crate) wanted: &'a [Target],
    /// Prefill instances, and as many for decode.
    pub(crate) pairs: u32,
    /// No text is sent twice, up to [`FRESH_TEXTS_MOST`].
    pub(crate) fresh: bool,
    pub(crate) words: Words,
    /// Where the coordinator finds the model: in `folder`.
    pub(crate) model: &'a Path,
    /// For logs, too.
    pub(crate) folder: &'a Path,
}

/// Everything that runs.
pub(crate) struct Bench {
    worker: Asked,
    client: Asked,
    /// And where it listens.
    floor: (Asked, String),
    /// The worker's own address, for who asks it without a router.
    direct: String,
    routers: BTreeMap<Target, Router>,
    seed: u64,
    /// Of the texts that come again.
    texts_seed: u64,
    /// No text is sent twice, up to [`FRESH_TEXTS_MOST`].
    fresh: bool,
}

impl Bench {
    /// Starts the worker, the client and all routers that are wanted, and waits until they answer.
    pub(crate) async fn start(setup: Setup<'_>) -> Result<Self, BenchError> {
        let Setup { programs, wanted, pairs, fresh, words, model, folder } = setup;
        let mut worker = Asked::start("worker")?;
        let mut client = Asked::start("client")?;
        let ready: WorkerReady = worker.ask(&WorkerSetup { words: words.clone(), pairs }).await?;
        client.tell(&words).await?;
        let mut floor = Asked::start("floor")?;
        let FloorReady { address } = floor.ask(&words).await?;
        let mut routers = BTreeMap::new();
        for &target in wanted {
            let Some(program) = programs.of(target) else { continue };
            let router = match target {
                Target::Baton => targets::coordinator(&program, model, (&words, &ready, folder)).await?,
                Target::Direct | Target::Floor | Target::BatonIds => continue,
                peer => targets::peer(peer, &program, (&ready, folder))?,
            };
            routers.insert(target, router);
        }
        let direct = ready.decode.first().map(|decode| decode.http.clone()).unwrap_or_default();
        // Not the same prompts in the next run: a router that has survived none would know them, but nobody should.
        let seed = u64::from(std::process::id());
        let floor = (floor, address);
        let mut bench = Self { worker, client, floor, direct, routers, seed, texts_seed: seed, fresh };
        for &target in wanted {
            bench.warm_up(target).await?;
        }
        Ok(bench)
    }

    /// Whether anything can be asked of it.
    pub(crate) fn has(&self, target: Target) -> bool {
        matches!(target, Target::Direct | Target::Floor) || self.router(target).is_some()
    }

    /// The process that is measured, and where it is asked.
    fn measured(&self, target: Target) -> (Option<u32>, String) {
        match (target, self.router(target)) {
            (Target::Floor, _) => (self.floor.0.pid(), self.floor.1.clone()),
            (_, Some(router)) => (Some(router.pid), router.address.clone()),
            (_, None) => (None, self.direct.clone()),
        }
    }

    fn router(&self, target: Target) -> Option<&Router> {
        self.routers.get(if target == Target::BatonIds { &Target::Baton } else { &target })
    }

    async fn warm_up(&mut self, target: Target) -> Result<(), BenchError> {
        let line = Line { prompt: Prompt::Short, answer: Answer::Unpaced, streams: 1 };
        let began = Instant::now();
        while self.has(target) {
            match self.load(target, &line, 1).await {
                Ok(_) => {
                    self.load(target, &Line { streams: 16, ..line }, WARM_UP).await?;
                    break;
                }
                Err(error) if began.elapsed() > START_PATIENCE => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
        Ok(())
    }

    /// Opens the connections between a router and the worker that are closed while others are measured, and sends every text
    /// that is to come again. What it finds closed in the midst of that may fail a request of it.
    async fn make_ready(&mut self, target: Target, line: &Line) {
        let prompt = if self.fresh { Prompt::Short } else { line.prompt };
        let line = Line { prompt, answer: Answer::Unpaced, streams: line.streams };
        let _ = self.load(target, &line, line.streams.max(TEXTS)).await;
    }

    /// One line of one of them.
    pub(crate) async fn load(
        &mut self,
        target: Target,
        line: &Line,
        requests: u32,
    ) -> Result<Figures, BenchError> {
        let (pid, address) = self.measured(target);
        self.seed += 1;
        let job = Job {
            address,
            spelling: target.spelling(),
            stream: line.answer.is_streamed(),
            streams: line.streams,
            requests,
            prompt_words: line.prompt.words(),
            texts: requests.min(if self.fresh { FRESH_TEXTS_MOST } else { TEXTS }),
            texts_seed: if self.fresh { self.seed } else { self.texts_seed },
            seed: self.seed,
            ramp_micros: line.ramp_micros(),
        };
        for engine in [&mut self.worker, &mut self.floor.0] {
            let _: Done = engine.ask(&Pace { step_micros: line.answer.step_micros() }).await?;
        }
        let _: Done = self.client.ask(&job).await?;
        pid.into_iter().for_each(forget_peak);
        let before = pid.map(CpuTime::of);
        let outcome: Outcome = self.client.ask(&Done {}).await?;
        let cpu = pid.zip(before).map(|(pid, before)| CpuTime::of(pid).millis_since(&before));
        if let Some(fault) = outcome.fault {
            return Err(BenchError::Answer { target: target.name(), fault });
        }
        let peak = pid.map(peak_megabytes).transpose()?;
        Ok(Figures::of(&outcome, cpu.unwrap_or(f64::NAN), peak.unwrap_or(f64::NAN)))
    }

    /// All rounds of all lines.
    pub(crate) async fn rounds(
        &mut self,
        rounds: u32,
        requests: Option<u32>,
        lines: &[Line],
        wanted: &[Target],
    ) -> Result<Runs, BenchError> {
        let wanted: Vec<Target> = wanted.iter().copied().filter(|&target| self.has(target)).collect();
        let bar = ProgressBar::new(u64::from(rounds) * (lines.len() * wanted.len()) as u64);
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len}, {eta} left: {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        let mut runs = Runs::new();
        for round in 0..rounds as usize {
            for line in lines {
                // Who is first changes from round to round.
                let turn = |place: usize| wanted[(place + round) % wanted.len()];
                for target in (0..wanted.len()).map(turn).filter(|target| target.answers(line)) {
                    bar.set_message(format!("{line}, {}", target.name()));
                    self.make_ready(target, line).await;
                    let measured = self.load(target, line, requests.unwrap_or(line.requests())).await;
                    let figures = match measured {
                        // Another router that fails on a line has no figures there.
                        Err(BenchError::Answer { target: name, fault })
                            if Target::PEERS.contains(&target) =>
                        {
                            bar.suspend(|| eprintln!("{line}: {name} does not answer as it should: {fault}"));
                            Figures::NONE
                        }
                        measured => measured?,
                    };
                    // Who reads a file has no bar.
                    if bar.is_hidden() {
                        eprintln!("round {}, {line}, {}: {figures}", round + 1, target.name());
                    }
                    runs.entry((*line, target)).or_default().push(figures);
                    bar.inc(1);
                }
            }
        }
        bar.finish_and_clear();
        Ok(runs)
    }
}

/// Copies the model into `folder`, and opens the copy.
pub(crate) fn open(
    from: &Path,
    folder: &Path,
) -> Result<(std::path::PathBuf, baton_coordinator::prepare::Served), BenchError> {
    let name = from.file_name().unwrap_or_default();
    let copy = folder.join(name);
    model::lengthen(from, &copy)?;
    let served = model::open(&copy)?;
    Ok((copy, served))
}
