//! Tables for the rules, and a property: random histories against a model that counts everything anew.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

const BLOCK: u32 = 4;

/// Hashes of the full blocks of a sequence that is told by one number for each block.
fn chain(contents: &[u32]) -> Vec<BlockHash> {
    let mut parent = BlockHash::root("test", "");
    contents
        .iter()
        .map(|&content| {
            parent = parent.child(&[content]);
            parent
        })
        .collect()
}

/// A list of blocks that are full, final and sealed.
fn sealed(blocks: &mut BlockManager, contents: &[u32]) -> BlockList {
    let mut list = BlockList::default();
    assert!(blocks.extend(&mut list, contents.len() as u32 * BLOCK));
    (0..list.count()).for_each(|index| blocks.seal(&list, index, &chain(contents)));
    list
}

/// A list that begins with what is cached of `contents`, and whose other blocks are computed from that and sealed.
fn continued(blocks: &mut BlockManager, contents: &[u32]) -> BlockList {
    let mut list = blocks.take(&chain(contents));
    assert!(blocks.extend(&mut list, contents.len() as u32 * BLOCK));
    (0..list.count()).for_each(|index| blocks.seal(&list, index, &chain(contents)));
    list
}

#[test]
fn takes_all_or_nothing() {
    let mut blocks = BlockManager::new(3, 16);
    let mut list = BlockList::default();
    assert!(!blocks.extend(&mut list, 49));
    assert_eq!((blocks.room(), list.count()), (3, 0));
    assert!(blocks.extend(&mut list, 33));
    assert!(blocks.extend(&mut list, 48));
    assert_eq!((blocks.room(), list.count()), (0, 3));
    blocks.release(list);
    assert_eq!((blocks.room(), blocks.idle()), (3, 0));
}

#[test]
fn a_chain_is_found_as_far_as_it_is_the_same() {
    let mut blocks = BlockManager::new(8, BLOCK);
    let first = sealed(&mut blocks, &[1, 2, 3]);
    assert_eq!(blocks.find(&chain(&[1, 2, 9])), Cached { blocks: 2, idle: 0 });
    assert_eq!(blocks.find(&chain(&[9, 2, 3])), Cached::default());
    let shared = blocks.take(&chain(&[1, 2, 9]));
    assert_eq!(shared.as_slice(), &first.as_slice()[..2]);
    blocks.release(first);
    assert_eq!(blocks.find(&chain(&[1, 2, 3])), Cached { blocks: 3, idle: 1 });
    assert_eq!((blocks.room(), blocks.idle()), (6, 1));
    blocks.release(shared);
    assert_eq!((blocks.room(), blocks.idle()), (8, 3));
}

#[test]
fn the_end_of_the_chain_let_go_longest_ago_is_evicted_first() {
    let mut blocks = BlockManager::new(4, BLOCK);
    let (old, new) = (sealed(&mut blocks, &[1, 2]), sealed(&mut blocks, &[5, 6]));
    blocks.release(old);
    blocks.release(new);
    blocks.take_changes();
    let touched = blocks.take(&chain(&[1]));
    blocks.release(touched);
    let mut list = BlockList::default();
    let mut order = Vec::new();
    for tokens in 1..=4 {
        assert!(blocks.extend(&mut list, tokens * BLOCK));
        order.extend(blocks.take_changes());
    }
    let (old, new) = (chain(&[1, 2]), chain(&[5, 6]));
    assert_eq!(order, [old[1], new[1], new[0], old[0]].map(CacheChange::Evicted));
    assert_eq!(blocks.evictions(), 4);
}

#[test]
fn what_is_held_is_never_evicted() {
    let mut blocks = BlockManager::new(3, BLOCK);
    let held = sealed(&mut blocks, &[1, 2]);
    let mut other = BlockList::default();
    assert!(!blocks.extend(&mut other, 2 * BLOCK));
    assert!(blocks.extend(&mut other, BLOCK));
    assert_eq!(blocks.find(&chain(&[1, 2])).blocks, 2);
    blocks.release(held);
    assert!(blocks.extend(&mut other, 2 * BLOCK));
    assert_eq!(blocks.find(&chain(&[1, 2])).blocks, 1);
}

#[test]
fn a_shared_last_block_is_copied_by_all_but_the_last_that_writes_it() {
    let mut blocks = BlockManager::new(4, BLOCK);
    let mut first = sealed(&mut blocks, &[1]);
    assert!(blocks.extend(&mut first, BLOCK + 2));
    let mut second = blocks.fork(&first);
    let mut third = blocks.fork(&first);
    let shared = first.as_slice()[1];
    let Write::Copy { from, to } = blocks.write(&mut second, 1) else { panic!("it was not copied") };
    assert_eq!((from, second.as_slice()[1]), (shared, to));
    assert!(to != shared);
    assert!(matches!(blocks.write(&mut third, 1), Write::Copy { from, .. } if from == shared));
    assert_eq!(blocks.write(&mut first, 1), Write::InPlace);
    assert_eq!(first.as_slice()[1], shared);
    assert_eq!(blocks.room(), 0);
    let mut fourth = blocks.fork(&first);
    assert_eq!(blocks.write(&mut fourth, 1), Write::NoRoom);
    [first, second, third, fourth].into_iter().for_each(|list| blocks.release(list));
    assert_eq!((blocks.room(), blocks.idle()), (4, 1));
}

#[test]
fn what_is_not_trusted_is_never_found_and_stays_with_who_holds_it() {
    let mut blocks = BlockManager::new(4, BLOCK);
    let bad = sealed(&mut blocks, &[1, 2]);
    let other = blocks.take(&chain(&[1]));
    blocks.take_changes();
    blocks.distrust(&bad, &chain(&[1, 2]));
    assert_eq!(blocks.take_changes().len(), 2);
    assert_eq!(blocks.find(&chain(&[1, 2])), Cached::default());
    blocks.release(bad);
    assert_eq!((blocks.room(), blocks.idle()), (3, 0));
    blocks.release(other);
    assert_eq!((blocks.room(), blocks.idle()), (4, 0));
}

#[test]
fn what_was_computed_from_what_is_in_doubt_is_not_found_once_its_beginning_is_there_again() {
    let mut blocks = BlockManager::new(16, BLOCK);
    let bad = sealed(&mut blocks, &[1, 2, 3]);
    let idle = continued(&mut blocks, &[1, 2, 4]);
    let running = continued(&mut blocks, &[1, 2, 5]);
    let other = sealed(&mut blocks, &[6, 2]);
    blocks.release(idle);
    blocks.take_changes();
    blocks.distrust(&bad, &chain(&[1, 2, 3]));
    let changes: HashSet<BlockHash> = blocks
        .take_changes()
        .into_iter()
        .map(|change| match change {
            CacheChange::Evicted(hash) => hash,
            CacheChange::Stored(hash) => panic!("{hash} was stored"),
        })
        .collect();
    let [three, four, five] = [3, 4, 5].map(|last| chain(&[1, 2, last]));
    assert_eq!(changes, [three[0], three[1], three[2], four[2], five[2]].into());
    assert_eq!([&bad, &running, &other].map(|list| blocks.trusts(list)), [false, false, true]);
    assert_eq!(blocks.find(&chain(&[6, 2])).blocks, 2);
    blocks.release(bad);
    let again = sealed(&mut blocks, &[1, 2, 3]);
    assert!(blocks.trusts(&again));
    for last in [4, 5] {
        assert_eq!(blocks.find(&chain(&[1, 2, last])).blocks, 2, "a child of what was in doubt is found");
    }
    [running, other, again].into_iter().for_each(|list| blocks.release(list));
    assert_eq!((blocks.room(), blocks.idle(), blocks.distrusted), (16, 5, 0));
}

#[test]
fn who_holds_what_is_in_doubt_seals_nothing_more() {
    let mut blocks = BlockManager::new(16, BLOCK);
    // Two compute the same beginning, one takes what the second computed behind it.
    let first = sealed(&mut blocks, &[1]);
    let mut second = sealed(&mut blocks, &[1, 2]);
    let mut third = continued(&mut blocks, &[1, 2, 3]);
    assert!(first.as_slice()[0] != second.as_slice()[0] && third.as_slice()[1] == second.as_slice()[1]);
    blocks.distrust(&third, &chain(&[1, 2, 3]));
    assert_eq!([&first, &second, &third].map(|list| blocks.trusts(list)), [false; 3]);
    let again = sealed(&mut blocks, &[1, 2]);
    blocks.take_changes();
    for list in [&mut second, &mut third] {
        let (at, contents) = (list.count(), [1, 2, 3, 4]);
        assert!(blocks.extend(list, (at + 1) * BLOCK));
        blocks.seal(list, at, &chain(&contents));
    }
    assert_eq!(blocks.take_changes(), []);
    [first, second, third, again].into_iter().for_each(|list| blocks.release(list));
    assert_eq!((blocks.room(), blocks.distrusted), (16, 0));
}

/// One thing that may happen to one of a few lists.
#[derive(Debug, Clone)]
enum Happening {
    Extend {
        tokens: u32,
    },
    /// The next block of the list that is not sealed is, with this content.
    Seal {
        content: u32,
    },
    /// The list becomes one that begins with this chain, if it was empty.
    Take {
        contents: Vec<u32>,
    },
    /// The list becomes a fork of this one, if it was empty.
    Fork {
        of: usize,
    },
    Write,
    Distrust,
    Release,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (0u32..40).prop_map(|tokens| Happening::Extend { tokens }),
        6 => (0u32..2).prop_map(|content| Happening::Seal { content }),
        4 => prop::collection::vec(0u32..2, 0..5).prop_map(|contents| Happening::Take { contents }),
        2 => (0usize..LISTS).prop_map(|of| Happening::Fork { of }),
        2 => Just(Happening::Write),
        1 => Just(Happening::Distrust),
        3 => Just(Happening::Release),
    ]
}

const LISTS: usize = 6;

/// What the model knows: of each list its blocks and the contents of its full ones.
#[derive(Default)]
struct Model {
    lists: Vec<(Vec<BlockId>, Vec<u32>)>,
    stored: HashMap<BlockHash, BlockId>,
    /// When each block was last let go by the last that held it.
    let_go: HashMap<BlockId, u64>,
    clock: u64,
    /// Of each full block, those that its content followed from; and those whose content is wrong.
    from: HashMap<BlockId, HashSet<BlockId>>,
    wrong: HashSet<BlockId>,
}

impl Model {
    /// A list has got a block, which holds what another one does, or nothing yet.
    fn allocated(&mut self, block: BlockId, copied: Option<BlockId>) {
        self.from.remove(&block);
        self.from.values_mut().for_each(|from| {
            from.remove(&block);
        });
        self.wrong.remove(&block);
        self.wrong.extend(copied.filter(|from| self.wrong.contains(from)).map(|_| block));
    }

    /// A list has computed its block `index` from those before it.
    fn computed(&mut self, list: &[BlockId], index: usize) {
        let before = &list[..index];
        let from: HashSet<BlockId> =
            before.iter().flat_map(|block| self.from.get(block)).flatten().copied().collect();
        let from: HashSet<BlockId> = from.into_iter().chain(before.iter().copied()).collect();
        if before.iter().any(|block| self.wrong.contains(block)) {
            self.wrong.insert(list[index]);
        }
        self.from.insert(list[index], from);
    }

    /// All of a list turns out wrong, and with it what followed from any of it.
    fn damaged(&mut self, list: &[BlockId]) {
        let followed = self.from.iter().filter(|(_, from)| list.iter().any(|block| from.contains(block)));
        let followed: Vec<BlockId> = followed.map(|(block, _)| *block).collect();
        self.wrong.extend(followed.iter().chain(list));
    }

    fn holders(&self, block: BlockId) -> usize {
        self.lists.iter().flat_map(|(blocks, _)| blocks).filter(|&&held| held == block).count()
    }

    fn release(&mut self, which: usize) {
        let (blocks, _) = std::mem::take(&mut self.lists[which]);
        for block in blocks.into_iter().rev().filter(|&block| self.holders(block) == 0).collect::<Vec<_>>() {
            self.clock += 1;
            self.let_go.insert(block, self.clock);
        }
    }

    /// Learns what changed; an eviction must be of what was let go longest ago.
    fn learn(&mut self, changes: Vec<CacheChange>, evicts: bool, sealing: Option<BlockId>) {
        for change in changes {
            match change {
                CacheChange::Stored(hash) => {
                    let block = sealing.expect("nothing was sealed");
                    assert!(self.stored.insert(hash, block).is_none(), "stored twice");
                }
                CacheChange::Evicted(hash) => {
                    let block = self.stored.remove(&hash).expect("evicted what was not stored");
                    if evicts {
                        let age = |block: &BlockId| self.let_go[block];
                        assert_eq!(self.holders(block), 0, "evicted while it was held");
                        let idle = self.stored.values().filter(|&&block| self.holders(block) == 0);
                        assert!(idle.map(age).all(|other| other > age(&block)), "not the oldest");
                    }
                }
            }
        }
    }

    fn check(&self, manager: &BlockManager) {
        let all: Vec<BlockId> = (0..manager.total()).map(BlockId).collect();
        for &block in &all {
            let state = &manager.blocks[block.0 as usize];
            assert_eq!(state.holders as usize, self.holders(block), "{block:?}");
            let places = [
                state.holders > 0,
                manager.free.contains(&block),
                manager.idle.values().any(|&idle| idle == block),
            ];
            assert_eq!(places.iter().filter(|&&is| is).count(), 1, "{block:?} is in {places:?}");
            assert!(!places[1] || state.seal.is_none(), "{block:?} is free and sealed");
            assert!(places[0] || !state.distrusted, "{block:?} is in doubt and nobody's");
            let stored = self.stored.iter().find(|(_, stored)| **stored == block).map(|(hash, _)| *hash);
            assert_eq!(state.seal.map(|seal| seal.hash), stored, "{block:?}");
            assert!(stored.is_none() || !self.wrong.contains(&block), "{block:?} is wrong and can be taken");
        }
        let distrusted = manager.blocks.iter().filter(|block| block.distrusted).count();
        assert_eq!(manager.distrusted as usize, distrusted);
        assert_eq!(manager.sealed, self.stored);
        let held: HashSet<BlockId> =
            self.lists.iter().flat_map(|(blocks, _)| blocks.iter().copied()).collect();
        assert_eq!(manager.room() as usize + held.len(), all.len());
    }
}

proptest! {
    #[test]
    fn every_block_is_in_one_state_and_holders_are_counted_right(
        happenings in prop::collection::vec((0usize..LISTS, happening()), 1..300),
        pool in 4u32..24,
    ) {
        let mut manager = BlockManager::new(pool, BLOCK);
        let mut lists: Vec<BlockList> = (0..LISTS).map(|_| BlockList::default()).collect();
        let mut model =
            Model { lists: vec![Default::default(); LISTS], ..Model::default() };
        for (which, happening) in happenings {
            let list = &mut lists[which];
            let (mut evicts, mut sealing) = (false, None);
            match happening {
                Happening::Extend { tokens } => {
                    let (before, room) = (list.count(), manager.room());
                    let wanted = tokens.div_ceil(BLOCK).max(before);
                    evicts = true;
                    prop_assert_eq!(manager.extend(list, tokens), wanted - before <= room);
                    prop_assert_eq!(list.count(), if wanted - before <= room { wanted } else { before });
                    let known = &model.lists[which].0;
                    prop_assert!(list.as_slice().starts_with(known));
                    prop_assert!(list.as_slice()[known.len()..].iter().all(|&block| model.holders(block) == 0));
                    let new = list.as_slice()[known.len()..].to_vec();
                    new.into_iter().for_each(|block| model.allocated(block, None));
                }
                Happening::Seal { content } => {
                    let index = model.lists[which].1.len();
                    // A block that is shared and not full is written by nobody, so it is not filled either.
                    sealing = list.as_slice().get(index).copied().filter(|&block| model.holders(block) == 1);
                    if sealing.is_some() {
                        let contents = &mut model.lists[which].1;
                        contents.push(content);
                        manager.seal(list, index as u32, &chain(contents));
                        model.computed(list.as_slice(), index);
                    }
                }
                Happening::Take { contents } if list.count() == 0 => {
                    let hashes = chain(&contents);
                    let found: Vec<BlockId> = hashes.iter().map_while(|hash| model.stored.get(hash).copied()).collect();
                    let idle = found.iter().filter(|&&block| model.holders(block) == 0).count() as u32;
                    prop_assert_eq!(manager.find(&hashes), Cached { blocks: found.len() as u32, idle });
                    *list = manager.take(&hashes);
                    prop_assert_eq!(list.as_slice(), &found[..]);
                    model.lists[which].1 = contents[..found.len()].to_vec();
                }
                Happening::Fork { of } if list.count() == 0 => {
                    let forked = manager.fork(&lists[of]);
                    model.lists[which].1 = model.lists[of].1.clone();
                    lists[which] = forked;
                }
                Happening::Write => {
                    let index = model.lists[which].1.len();
                    if let Some(&old) = list.as_slice().get(index)
                        && manager.blocks[old.0 as usize].seal.is_none()
                    {
                        evicts = true;
                        let shared = model.holders(old) > 1;
                        match manager.write(list, index as u32) {
                            Write::InPlace => prop_assert!(!shared),
                            Write::NoRoom => prop_assert!(shared && manager.room() == 0),
                            Write::Copy { from, to } => {
                                prop_assert!(shared && from == old && model.holders(to) == 0);
                                prop_assert_eq!(list.as_slice()[index], to);
                                model.allocated(to, Some(from));
                            }
                        }
                    }
                }
                Happening::Distrust => {
                    manager.distrust(list, &chain(&model.lists[which].1));
                    model.damaged(list.as_slice());
                }
                Happening::Release => {
                    manager.release(std::mem::take(list));
                    model.release(which);
                }
                Happening::Take { .. } | Happening::Fork { .. } => {}
            }
            model.learn(manager.take_changes(), evicts, sealing);
            model.lists[which].0 = lists[which].as_slice().to_vec();
            model.check(&manager);
        }
        lists.into_iter().for_each(|list| manager.release(list));
        prop_assert_eq!(manager.room(), pool);
    }
}
