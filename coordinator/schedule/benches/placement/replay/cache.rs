//! The prefix cache of an instance: block ids, of which the least recently used are given up.

use std::collections::{HashMap, VecDeque};

#[derive(Debug)]
pub(crate) struct Cache {
    blocks_most: usize,
    /// When each block was used last.
    used: HashMap<u64, u64>,
    /// Uses in their order; one that a later use of its block has made void is skipped.
    uses: VecDeque<(u64, u64)>,
    clock: u64,
    news: Changes,
}

/// Blocks that came and went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    pub(crate) stored: Vec<u64>,
    pub(crate) evicted: Vec<u64>,
}

impl Cache {
    pub(crate) fn new(blocks_most: usize) -> Self {
        Self { blocks_most, used: HashMap::new(), uses: VecDeque::new(), clock: 0, news: Changes::default() }
    }

    /// What came and went since this was asked last.
    pub(crate) fn changes(&mut self) -> Changes {
        std::mem::take(&mut self.news)
    }

    /// Leading blocks of a chain that are held.
    pub(crate) fn held(&self, chain: &[u64]) -> usize {
        chain.iter().take_while(|block| self.used.contains_key(*block)).count()
    }

    /// Holds a chain. Its end counts as used before its beginning, so that no chain is given up from the front.
    pub(crate) fn hold(&mut self, chain: &[u64]) {
        for block in chain.iter().rev() {
            self.clock += 1;
            if self.used.insert(*block, self.clock).is_none() {
                self.news.stored.push(*block);
            }
            self.uses.push_back((*block, self.clock));
        }
        self.fit();
    }

    /// Holds no more blocks than so many from now on.
    pub(crate) fn limit(&mut self, blocks_most: usize) {
        self.blocks_most = blocks_most;
        self.fit();
    }

    fn fit(&mut self) {
        while self.used.len() > self.blocks_most
            && let Some((block, at)) = self.uses.pop_front()
        {
            if self.used.get(&block) == Some(&at) {
                self.used.remove(&block);
                self.news.evicted.push(block);
            }
        }
        // Void uses are as many as blocks at most.
        if self.uses.len() > 2 * self.used.len() + 64 {
            let used = &self.used;
            self.uses.retain(|(block, at)| used.get(block) == Some(at));
        }
    }
}
