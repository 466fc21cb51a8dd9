//! Readers that a delivery wakes read on the thread that delivered, once all of it has been delivered.
//!
//! A step brings tokens of many requests at once. To wake a task for each of them costs more than to read them; so an
//! attachment gathers who is woken while it delivers, then has all of them read, and then all of them send: what one thing needs
//! of code stays in the caches, and who receives it all finds the next piece there when done with the last. What a request
//! keeps was last touched a step ago, and is far from the processor by now: it is asked for before anybody reads, for some
//! at a time. Readers of other kinds are woken as ever.

use std::{cell::RefCell, sync::Arc};

/// So many read in turn; more than these take turns of their own, wherever a thread is free.
const IN_TURN: usize = 64;
/// Memory is asked for ahead for so many at a time: what comes is still near when it is used.
pub(super) const FEW: usize = 16;
/// See [`Reader::prefetch`].
const DEPTHS: usize = 3;

/// Who can read without a task of its own. Must neither wait for anything nor panic.
pub trait Reader: Send + Sync {
    /// Has the processor fetch what reading touches: with each `depth`, from 0, what could be found once the last had come.
    fn prefetch(&self, depth: usize);

    /// Takes in what has come. True: it has something to send.
    fn read(self: Arc<Self>) -> bool;

    /// Sends what was read.
    fn send(&self);
}

/// Who has been woken while something is delivered.
pub(super) type Woken = Vec<Arc<dyn Reader>>;

thread_local! {
    /// Of what this thread delivers right now.
    static WOKEN: RefCell<Option<Woken>> = const { RefCell::new(None) };
}

/// For as long as something is delivered.
struct Gathering;

impl Gathering {
    fn begin() -> Self {
        WOKEN.set(Some(Vec::new()));
        Self
    }

    fn end(self) -> Woken {
        WOKEN.take().unwrap_or_default()
    }
}

impl Drop for Gathering {
    /// A delivery that met a bug: whom it had woken still reads what there is.
    fn drop(&mut self) {
        if let Some(woken) = WOKEN.take() {
            take_turns(woken);
        }
    }
}

/// Delivers, and gathers those whom that wakes.
pub(super) fn gather<R>(deliver: impl FnOnce() -> R) -> (R, Woken) {
    let gathering = Gathering::begin();
    let delivered = deliver();
    (delivered, gathering.end())
}

/// `reader` is woken, by this thread. False where nobody gathers: it is to be woken otherwise.
pub fn woken<R: Reader + 'static>(reader: &Arc<R>) -> bool {
    WOKEN.with_borrow_mut(|woken| match woken {
        Some(woken) => {
            woken.push(reader.clone());
            true
        }
        None => false,
    })
}

/// Has all of them read, and then send.
pub(super) fn read(mut woken: Woken) {
    while woken.len() > IN_TURN {
        let turn = woken.split_off(woken.len() - IN_TURN);
        // Not waited for: it waits for nothing itself.
        tokio::spawn(async move { take_turns(turn) });
    }
    take_turns(woken);
}

fn take_turns(readers: Woken) {
    let mut speak = Vec::with_capacity(readers.len());
    for few in readers.chunks(FEW) {
        for depth in 0..DEPTHS {
            few.iter().for_each(|reader| reader.prefetch(depth));
        }
        speak.extend(few.iter().filter(|reader| Arc::clone(reader).read()));
    }
    speak.iter().for_each(|reader| reader.send());
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Default)]
    struct Counting {
        read: AtomicUsize,
        sent: AtomicUsize,
    }

    impl Reader for Counting {
        fn prefetch(&self, _: usize) {}

        fn read(self: Arc<Self>) -> bool {
            self.read.fetch_add(1, Ordering::Relaxed).is_multiple_of(2)
        }

        fn send(&self) {
            self.sent.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn everybody_who_was_woken_meanwhile_reads_once() {
        const READERS: usize = IN_TURN * 2 + 4;
        let reader = Arc::new(Counting::default());
        let count = |of: &AtomicUsize| of.load(Ordering::Relaxed);
        assert!(!woken(&reader), "nobody delivers");
        let ((), all) = gather(|| {
            (0..READERS).for_each(|_| assert!(woken(&reader)));
        });
        assert!(!woken(&reader), "all has been delivered");
        assert_eq!(count(&reader.read), 0, "not before all has been delivered");
        read(all);
        assert!(count(&reader.read) <= IN_TURN, "the others do not wait for all of these");
        while Arc::strong_count(&reader) > 1 {
            tokio::task::yield_now().await;
        }
        assert_eq!((count(&reader.read), count(&reader.sent)), (READERS, READERS / 2));
    }

    #[test]
    fn a_delivery_that_meets_a_bug_leaves_nobody_waiting() {
        let reader = Arc::new(Counting::default());
        let broken = std::panic::catch_unwind(|| {
            gather(|| {
                _ = woken(&reader);
                panic!("as the test wants it");
            })
        });
        assert!(broken.is_err());
        assert_eq!(reader.read.load(Ordering::Relaxed), 1);
        assert!(!woken(&reader), "nobody delivers any more");
    }
}
