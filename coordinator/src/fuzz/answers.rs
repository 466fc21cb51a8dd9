//! Fuzz target of what instances say to a coordinator: tokens and ends of legs, loads, roles, and what they have cached.

use std::{
    collections::VecDeque,
    sync::{Arc, LazyLock},
    task::Waker,
    time::Duration,
};

use baton_proto::v1;
use baton_schedule::{
    NoPlace, Settings, Side, Wanted,
    board::Board,
    fleet::{
        Role,
        testing::{ready, spec},
    },
};
use prost::Message as _;
use tokio::{runtime::Runtime, time::Instant};
use v1::attach_response::Frame as Answer;

use crate::{
    dispatch::machine::{Command, Machine},
    fleet::{Expected, Mailbox, attachment::standing::Stand, cache::fuzz::Listener},
    metrics::Metrics,
};

const MAX_TOKENS: u32 = 48;
const CHOICES: u32 = 2;

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime"));
static METRICS: LazyLock<Arc<Metrics>> =
    LazyLock::new(|| baton_process::Metrics::new("coordinator").register(Metrics::register));

/// One choice of the request, as its reader has it.
struct Reader {
    machine: Machine,
    given: Vec<u32>,
    ended: bool,
}

impl Reader {
    fn take(&mut self, commands: Vec<Command>) {
        assert!(!self.ended || commands.is_empty(), "nothing follows the end: {commands:?}");
        for (at, command) in commands.iter().enumerate() {
            if let Command::End(_) = command {
                assert_eq!(at + 1, commands.len(), "nothing follows the end");
                self.ended = true;
            }
        }
        assert_eq!(self.ended, self.machine.is_over());
        let from = self.given.len();
        let fresh = self.machine.take_fresh();
        assert!(fresh.logprobs.len() == fresh.tokens.len());
        self.given.extend_from_slice(fresh.tokens);
        assert_eq!(self.machine.tokens(), self.given, "tokens are given once, in order");
        assert!(self.given.len() <= MAX_TOKENS as usize && from <= self.given.len());
    }
}

/// Messages, each with a byte for who sends it and one for its length: by two instances, one of which prefills and the other
/// decodes, on their streams of answers or of what is in their caches.
pub fn answers(bytes: &[u8]) {
    let _enter = RUNTIME.enter();
    let board = Board::new(Duration::from_secs(60), Settings::DEFAULT);
    let specs = ["a", "b"].map(spec);
    board.list(&specs, Instant::now());
    for (spec, role) in specs.iter().zip([Role::Prefill, Role::Decode]) {
        board.up(&spec.id, spec.incarnation, ready(role));
    }
    let mut stands = specs.each_ref().map(|spec| Stand::new(&spec.id, &METRICS));
    let mut caches = specs.each_ref().map(|spec| Listener::new(spec.incarnation, board.feed(&spec.id)));
    let wanted = Wanted { choices: CHOICES, ..Wanted::new(10, MAX_TOKENS, "r1") };
    let mut booking = board.book(&wanted).expect("both are ready");
    let in_batches = bytes.first().is_some_and(|first| first & 0x40 != 0);
    let expected = Expected { choices: CHOICES, max_tokens: MAX_TOKENS, top_logprobs: Some(20), in_batches };
    let mailbox = Arc::new(Mailbox::new(expected));
    let guards = [Side::Prefill, Side::Decode].into_iter().zip(&mut stands).map(|(side, stand)| {
        let (credit, dispatch) = (&mut booking.credit, v1::Dispatch::default());
        stand.attachment.dispatch(side, CHOICES, &mailbox, credit, dispatch).expect("it is up")
    });
    let guards: Vec<_> = guards.collect();
    let reader = || Reader {
        machine: Machine::apart(MAX_TOKENS).with_logprobs(true),
        given: Vec::new(),
        ended: false,
    };
    let mut readers = [reader(), reader()];
    // Who has said to hold less than a prompt of 100 tokens and one more.
    let mut small = [false; 2];
    let mut rest = bytes;
    while let [who, length, behind @ ..] = rest {
        let (message, behind) = behind.split_at(behind.len().min(usize::from(*length)));
        rest = behind;
        let at = usize::from(who % 2);
        if who & 2 != 0 {
            if let Ok(events) = v1::KvEvents::decode(message) {
                caches[at].take(events);
            }
            continue;
        }
        let Ok(v1::AttachResponse { frame: Some(frame) }) = v1::AttachResponse::decode(message) else {
            continue;
        };
        let instance = &specs[at].id;
        match frame {
            Answer::Step(step) => {
                let news = stands[at].step(step);
                board.take_news(instance, &news);
            }
            Answer::Load(load) => {
                small[at] = (1..101u32.div_ceil(specs[at].block_tokens)).contains(&load.kv_blocks_total);
                board.load(instance, (&load).into());
            }
            Answer::Role(change) => board.duty(instance, (&change).into()),
            Answer::Welcome(_) => {}
        }
        read(&mailbox, &mut readers);
        let left = board.left(instance, 1, MAX_TOKENS);
        assert!(left < Duration::from_secs(1 << 40), "{left:?}");
        // Whoever is ready yet is found, whatever they say of their load; but for what they say they cannot hold, somebody
        // else may be waited for.
        if board.can_serve("r1").is_ok() {
            let placed =
                [(1, 2), (100, 100)].map(|(prompt, most)| board.book(&Wanted::new(prompt, most, "r1")));
            let [short, long] = placed.map(|placed| placed.err());
            assert!(short.is_none(), "{short:?}");
            let waits = small.contains(&true) && !matches!(long, Some(NoPlace::Busy | NoPlace::OtherModel));
            assert!(long.is_none() || waits, "{long:?}");
        }
    }
    for reader in &mut readers {
        let commands = reader.machine.stop();
        reader.take(commands);
        assert!(reader.ended);
    }
    drop((guards, booking));
    // What was sent to them may be under way, until their streams are gone.
    specs.iter().for_each(|spec| board.detached(&spec.id));
    for (id, work) in board.own_work() {
        assert_eq!(work, Default::default(), "nothing of {id} is left behind");
    }
}

fn read(mailbox: &Mailbox, readers: &mut [Reader; 2]) {
    let mut taken = VecDeque::new();
    mailbox.take(Waker::noop(), &mut taken);
    for (side, output) in taken {
        let Some(reader) = readers.get_mut(output.choice as usize) else {
            panic!("choice {} was not asked for", output.choice);
        };
        let commands = reader.machine.output(side, output);
        reader.take(commands);
    }
}
