//! Claims on blocks that several threads want at once.

use super::*;

/// Blocks as those that hold claims on them see them: how many write and read each.
#[derive(Default)]
struct Seen([(AtomicU32, AtomicU32); BLOCKS as usize]);

impl Seen {
    fn hold(&self, write: &[u32], read: &[u32]) {
        for &block in write {
            let (writers, readers) = &self.0[block as usize];
            assert_eq!(writers.fetch_add(1, SeqCst), 0, "two write block {block}");
            assert_eq!(readers.load(SeqCst), 0, "block {block} is written while it is read");
        }
        for &block in read {
            let (writers, readers) = &self.0[block as usize];
            readers.fetch_add(1, SeqCst);
            assert_eq!(writers.load(SeqCst), 0, "block {block} is read while it is written");
        }
    }

    fn let_go(&self, write: &[u32], read: &[u32]) {
        for &block in write {
            self.0[block as usize].0.fetch_sub(1, SeqCst);
        }
        for &block in read {
            self.0[block as usize].1.fetch_sub(1, SeqCst);
        }
    }
}

fn writers_and_readers() {
    let (claims, seen) = (Claims::new(BLOCKS), Arc::new(Seen::default()));
    let wanted: [(&[u32], &[u32]); 4] = [(&[0, 1], &[2]), (&[3], &[]), (&[1], &[2, 3]), (&[2], &[])];
    let threads = wanted.map(|(write, read)| {
        let (claims, seen) = (claims.clone(), seen.clone());
        shuttle::thread::spawn(move || {
            for _ in 0..2 {
                let Ok(claimed) = claims.claim(write, read) else { continue };
                seen.hold(write, read);
                shuttle::thread::yield_now();
                seen.let_go(write, read);
                drop(claimed);
            }
        })
    });
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    drop(claims.claim(&[0, 1, 2, 3], &[]).expect("nothing leaked, by a refusal neither"));
}

#[test]
fn no_order_of_claims_lets_a_writer_and_another_in_or_leaks_one() {
    explore(writers_and_readers);
}
