//! What the fleet has cached, by instance, behind one lock.
//!
//! Written by the coordinator's reader of KV events, through a [`Feed`] for each instance, and by [`super::board`], which says
//! what requests in flight will leave where; read by the board for each request. The lock is held while one request is placed
//! and while a few hundred blocks change. Whoever holds the board's lock, too, took this one first.

use std::{collections::HashMap, sync::Arc};

use baton_proto::Sieve;
use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;

use super::index::{BLOCK_BYTES, Depths, PrefixIndex, Slot, Ticket};
use crate::chains::{Chain, Chains, Dialect, KnownStrides};

/// Blocks that are changed at a time, tens of microseconds.
const AT_ONCE: usize = 512;
/// Most dialects of a model: every prompt is hashed in each. Instances that speak another are not counted on.
const DIALECTS_MOST: usize = 8;

/// Why an instance's cache is not counted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("instances of its model name their blocks in {DIALECTS_MOST} other ways already")]
pub struct TooManyDialects;

/// What an instance says of its cache, beside its blocks.
#[derive(Debug, Clone, Copy)]
struct Advertised {
    slot: Slot,
    dialect: Dialect,
    /// It has said that it has some block: one that keeps none will not keep what it is sent either.
    keeps: bool,
}

/// What is known of all.
#[derive(Debug)]
pub struct State {
    index: PrefixIndex,
    /// Of what is cached one block for so many tokens is looked for.
    every_tokens: u32,
    /// By number of the instance; nobody's number is another's ever.
    instances: Vec<Option<Advertised>>,
    /// By model revision, with how many instances speak it.
    dialects: HashMap<Arc<str>, Vec<(Dialect, usize)>>,
    /// Of the request that is being placed.
    depths: Depths,
}

/// See the module.
#[derive(Debug)]
pub struct Caches {
    state: Mutex<State>,
    /// Of all prompts.
    strides: KnownStrides,
}

impl Caches {
    /// Remembers blocks in at most so many bytes, one for `every_tokens`.
    pub fn new(index_bytes: usize, every_tokens: u32) -> Arc<Self> {
        let index = PrefixIndex::new(index_bytes / BLOCK_BYTES, (rand::random(), rand::random()));
        let state = State {
            index,
            every_tokens,
            instances: Vec::new(),
            dialects: HashMap::new(),
            depths: Depths::default(),
        };
        Arc::new(Self { state: Mutex::new(state), strides: KnownStrides::default() })
    }

    /// How instances of a model name their blocks.
    pub fn dialects(&self, revision: &str) -> Vec<Dialect> {
        let state = self.state.lock();
        let spoken = state.dialects.get(revision).into_iter().flatten();
        spoken.map(|(dialect, _)| *dialect).collect()
    }

    /// What a prompt's blocks, with what was `generated` after it, are called by any instance of a model.
    pub fn name(&self, revision: &str, prompt: &Chains, generated: &[u32]) -> Vec<Chain> {
        prompt.say(&self.dialects(revision), generated, &self.strides)
    }

    /// For what an instance says of its cache. It is believed for as long as the feed lives.
    pub fn feed(self: &Arc<Self>, subject: Subject) -> Feed {
        Feed { caches: self.clone(), subject, current: None, building: None, keeps: false }
    }

    /// Blocks that are remembered, each once.
    pub fn blocks(&self) -> usize {
        self.state.lock().index.blocks()
    }

    /// Frees a part of what gone instances held. False: there is nothing to free.
    pub fn sweep(&self) -> bool {
        self.state.lock().index.sweep()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// What was expected of a request in flight is so, or will not be.
    pub(super) fn settle(&self, ticket: Ticket, until: Instant) {
        self.state.lock().index.settle(ticket, until);
    }
}

impl State {
    fn known(&self, instance: u32) -> Option<&Advertised> {
        self.instances.get(instance as usize)?.as_ref()
    }

    /// Looks up who has how much of a prompt, in each of its chains.
    pub(super) fn look(&mut self, chains: &[Chain], now: Instant) -> Held<'_> {
        self.depths.clear();
        for Chain { dialect, keys } in chains {
            let sieve = Sieve::new(self.every_tokens, dialect.block_tokens());
            self.index.depths(keys, sieve, now, &mut self.depths);
        }
        Held((!self.depths.is_empty()).then_some(&*self))
    }

    /// An instance will have computed, or received, a prompt.
    pub(super) fn expect(&mut self, instance: u32, chains: &[Chain]) -> Option<Ticket> {
        let known = self.known(instance).filter(|known| known.keeps)?;
        let chain = chains.iter().find(|chain| chain.dialect == known.dialect)?;
        Some(self.index.expect(known.slot, &chain.keys))
    }

    fn count(&mut self, revision: &Arc<str>, dialect: Dialect) -> Result<(), TooManyDialects> {
        let spoken = self.dialects.entry(revision.clone()).or_default();
        match spoken.iter().position(|(known, _)| *known == dialect) {
            Some(at) => spoken[at].1 += 1,
            None if spoken.len() < DIALECTS_MOST => spoken.push((dialect, 1)),
            None => return Err(TooManyDialects),
        }
        Ok(())
    }

    fn discount(&mut self, revision: &Arc<str>, dialect: Dialect) {
        let Some(spoken) = self.dialects.get_mut(revision) else { return };
        if let Some((_, instances)) = spoken.iter_mut().find(|(known, _)| *known == dialect) {
            *instances -= 1;
        }
        spoken.retain(|(_, instances)| *instances > 0);
        if spoken.is_empty() {
            self.dialects.remove(revision);
        }
    }
}

/// Who has how much of one prompt.
#[derive(Debug, Clone, Copy, Default)]
pub struct Held<'a>(Option<&'a State>);

impl Held<'_> {
    /// Full blocks that the instance of this number has from the prompt's start on, and the tokens of each.
    pub fn blocks(self, instance: u32) -> Option<(u32, u32)> {
        let state = self.0?;
        let known = state.known(instance)?;
        Some((state.depths.of(known.slot), known.dialect.block_tokens()))
    }
}

/// Whose cache is told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The instance's number in the view.
    pub instance: u32,
    /// Of its model.
    pub revision: Arc<str>,
}

/// What one instance says of its cache; dropped, it is forgotten.
#[derive(Debug)]
pub struct Feed {
    caches: Arc<Caches>,
    subject: Subject,
    current: Option<(Slot, Dialect)>,
    /// Of a snapshot that is not whole.
    building: Option<Slot>,
    /// Some block has been stored.
    keeps: bool,
}

impl Feed {
    /// A snapshot begins. What was known counts until it is whole.
    pub fn begin(&mut self) {
        let mut state = self.caches.state.lock();
        if let Some(unfinished) = self.building.take() {
            state.index.close(unfinished);
        }
        self.building = Some(state.index.open());
    }

    /// A part of the snapshot.
    pub fn store(&mut self, keys: &[u64]) {
        let Some(slot) = self.building else { return };
        self.keeps |= !keys.is_empty();
        keys.chunks(AT_ONCE).for_each(|some| self.caches.state.lock().index.change(slot, some, &[]));
    }

    /// The snapshot is whole.
    pub fn publish(&mut self, dialect: Dialect) -> Result<(), TooManyDialects> {
        let Some(slot) = self.building else { return Ok(()) };
        let state = &mut *self.caches.state.lock();
        state.count(&self.subject.revision, dialect)?;
        self.building = None;
        let old = self.current.replace((slot, dialect));
        if let Some((_, dialect)) = old {
            state.discount(&self.subject.revision, dialect);
        }
        state.index.publish(slot, old.map(|(old, _)| old));
        let known = Advertised { slot, dialect, keeps: self.keeps };
        let at = self.subject.instance as usize;
        if state.instances.len() <= at {
            state.instances.resize_with(at + 1, || None);
        }
        state.instances[at] = Some(known);
        Ok(())
    }

    /// What came and went since the last whole snapshot.
    pub fn change(&mut self, stored: &[u64], evicted: &[u64]) {
        let Some((slot, _)) = self.current else { return };
        // A change of which no block is wanted here is one, too.
        if !self.keeps {
            self.keeps = true;
            if let Some(Some(known)) =
                self.caches.state.lock().instances.get_mut(self.subject.instance as usize)
            {
                known.keeps = true;
            }
        }
        evicted.chunks(AT_ONCE).for_each(|some| self.caches.state.lock().index.change(slot, &[], some));
        stored.chunks(AT_ONCE).for_each(|some| self.caches.state.lock().index.change(slot, some, &[]));
    }

    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// Nothing is known any more.
    pub fn forget(&mut self) {
        let state = &mut *self.caches.state.lock();
        if let Some(unfinished) = self.building.take() {
            state.index.close(unfinished);
        }
        if let Some((slot, dialect)) = self.current.take() {
            state.index.close(slot);
            state.discount(&self.subject.revision, dialect);
            // Another stream to it may stand already.
            if state.known(self.subject.instance).is_some_and(|known| known.slot == slot) {
                state.instances[self.subject.instance as usize] = None;
            }
        }
    }

    /// One block for so many tokens is of use; 0 = all are.
    pub fn every_tokens(&self) -> u32 {
        self.caches.state.lock().every_tokens
    }

    /// Blocks that are remembered of all instances.
    pub fn blocks_of_all(&self) -> usize {
        self.caches.blocks()
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.forget();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dialect(layout: &str) -> Dialect {
        Dialect::new(layout, 4).expect("blocks of 4 tokens")
    }

    fn told(feed: &mut Feed, layout: &str, keys: &[u64]) -> Result<(), TooManyDialects> {
        feed.begin();
        feed.store(keys);
        feed.publish(dialect(layout))
    }

    fn subject(instance: u32) -> Subject {
        Subject { instance, revision: "r1".into() }
    }

    fn blocks(caches: &Caches, chains: &[Chain], instance: u32) -> Option<(u32, u32)> {
        caches.lock().look(chains, Instant::now()).blocks(instance)
    }

    #[test]
    fn each_instance_is_asked_in_its_own_dialect() {
        let caches = Caches::new(1 << 20, 0);
        let (mut a, mut b) = (caches.feed(subject(1)), caches.feed(subject(2)));
        let prompt = Chains::new((0..20).collect());
        assert!(caches.name("r1", &prompt, &[]).is_empty());
        let both = prompt.say(&[dialect("x"), dialect("y")], &[], &KnownStrides::default());
        told(&mut a, "x", &both[0].keys[..3]).expect("one dialect");
        told(&mut b, "y", &both[1].keys[..2]).expect("two dialects");
        assert_eq!(caches.dialects("r1"), [dialect("x"), dialect("y")]);
        assert_eq!(caches.dialects("r2"), []);
        let said = caches.name("r1", &prompt, &[]);
        assert_eq!(blocks(&caches, &said, 1), Some((3, 4)));
        assert_eq!(blocks(&caches, &said, 2), Some((2, 4)));
        assert_eq!(blocks(&caches, &said[1..], 1), Some((0, 4)));
        assert_eq!(blocks(&caches, &said, 3), None);
        drop(a);
        assert_eq!(caches.dialects("r1"), [dialect("y")]);
        assert_eq!(blocks(&caches, &said, 1), None);
        b.forget();
        assert!(caches.lock().dialects.is_empty() && caches.lock().instances.iter().all(Option::is_none));
        while caches.sweep() {}
        assert_eq!(caches.blocks(), 0);
    }

    #[test]
    fn a_late_end_of_an_old_stream_takes_nothing_from_the_new_one() {
        let caches = Caches::new(1 << 20, 0);
        let (mut old, mut new) = (caches.feed(subject(1)), caches.feed(subject(1)));
        told(&mut old, "x", &[1]).expect("one dialect");
        told(&mut new, "x", &[1]).expect("one dialect");
        drop(old);
        let chains = Chains::new((0..4).collect()).say(&[dialect("x")], &[], &KnownStrides::default());
        assert!(caches.lock().expect(1, &chains).is_some());
        assert_eq!(caches.dialects("r1"), [dialect("x")]);
    }

    #[test]
    fn nothing_is_expected_of_an_instance_that_keeps_nothing() {
        let caches = Caches::new(1 << 20, 0);
        let mut feed = caches.feed(subject(1));
        let chains = Chains::new((0..4).collect()).say(&[dialect("x")], &[], &KnownStrides::default());
        let expected = || caches.lock().expect(1, &chains).is_some();
        told(&mut feed, "x", &[]).expect("one dialect");
        assert!(!expected());
        feed.change(&[7], &[]);
        assert!(expected());
        told(&mut feed, "x", &[]).expect("one dialect");
        assert!(expected(), "it has only lost it");
    }

    #[test]
    fn prompts_are_hashed_in_no_more_dialects_than_a_few() {
        let caches = Caches::new(1 << 20, 0);
        let mut feeds: Vec<Feed> = (0..9).map(|n| caches.feed(subject(n))).collect();
        for (n, feed) in feeds.iter_mut().enumerate() {
            let told = told(feed, &format!("l{n}"), &[]);
            assert_eq!(told.is_ok(), n < 8, "{n}");
        }
        assert_eq!(caches.dialects("r1").len(), 8);
        feeds.remove(0);
        feeds.last_mut().expect("eight are left").publish(dialect("l8")).expect("there is room now");
    }
}
