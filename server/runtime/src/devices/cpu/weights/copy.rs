//! A copy on disk of a model's packed weights: the next load maps it instead of packing, and all servers of a host that
//! map it share its memory.
//!
//! ```text
//! copy   = magic (32 bytes), key (32), records
//! record = digest (32), length (u64, little endian), zeros up to 64 bytes, panels, zeros up to a multiple of 64
//! ```
//!
//! Records stand in the order in which the model asks for its matrices. A digest is over what the matrix is and over its
//! bytes; it is checked before they are used. A copy is written by one process at a time, who holds a lock, under another
//! name; it takes its own when it is whole, and is never changed afterwards.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime},
};

use baton_checkpoint::Checkpoint;
use sha2::{Digest, Sha256};

use crate::{
    RuntimeError,
    devices::cpu::{
        memory::{ALIGN, Bytes, Disjoint, MappedFile},
        threads::Pool,
    },
};

/// Begins every copy. To be changed with what [`super::pack`] makes of a matrix.
const MAGIC: &[u8; 32] = b"baton packed weights, 1         ";
const HEADER_BYTES: usize = 64;
const RECORD_BYTES: usize = 64;
/// Bytes that are digested by one task.
const PIECE: usize = 1 << 20;
/// A copy has at most so many times the bytes of the checkpoint's weights. Address space only.
const MOST_TIMES: usize = 4;
/// How often a process that waits for another's copy looks at it, and how long it waits when nothing comes.
const LOOK: Duration = Duration::from_millis(50);
const STALLED: Duration = Duration::from_secs(30);
/// Copies that nobody has used for so long are removed when another is written.
const UNUSED: Duration = Duration::from_secs(30 * 24 * 3600);

type Hash = [u8; 32];

pub(super) enum Copy {
    Whole(Reader),
    Begun(Writer),
}

pub(super) enum Found {
    Copy(Copy),
    /// Why there is none and cannot be.
    Unusable(String),
}

/// Finds a model's copy in a folder, or begins one. Waits for another process that is writing it, telling `waiting` how
/// many bytes there are, unless that one gets stuck.
pub(super) fn open(
    folder: &Path,
    checkpoint: &Checkpoint,
    exact_bf16: bool,
    waiting: &mut dyn FnMut(u64),
) -> Result<Found, RuntimeError> {
    let key = key(&checkpoint.revision()?, exact_bf16);
    let short: String = key[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let path = folder.join(format!("{}-{short}.packed", checkpoint.name()));
    let room = MOST_TIMES * checkpoint.weight_bytes() as usize + HEADER_BYTES;
    let found = find(path, &key, room, waiting);
    Ok(found.unwrap_or_else(|error| Found::Unusable(error.to_string())))
}

fn find(path: PathBuf, key: &Hash, room: usize, waiting: &mut dyn FnMut(u64)) -> io::Result<Found> {
    if let Some(reader) = Reader::open(&path, key)? {
        return Ok(Found::Copy(Copy::Whole(reader)));
    }
    if let Some(folder) = path.parent() {
        let mut builder = DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.recursive(true).create(folder)?;
    }
    let partial = path.with_extension("packed.part");
    let Some(lock) = lock(&path.with_extension("packed.lock"), &partial, STALLED, waiting)? else {
        let stuck = format!("another process has begun {} and does not go on", partial.display());
        return Ok(Found::Unusable(stuck));
    };
    // Whoever had the lock may have finished.
    Ok(Found::Copy(match Reader::open(&path, key)? {
        Some(reader) => Copy::Whole(reader),
        None => Copy::Begun(Writer::begin(path, partial, lock, *key, room)?),
    }))
}

/// What a copy is of: these bytes of a model, packed in this way.
fn key(revision: &str, exact_bf16: bool) -> Hash {
    let mut hash = Sha256::new();
    hash.update(MAGIC);
    hash.update([u8::from(exact_bf16)]);
    hash.update(revision);
    hash.finalize().into()
}

/// Waits for the lock until what its holder writes has not grown for `stalled`.
fn lock(
    path: &Path,
    written: &Path,
    stalled: Duration,
    waiting: &mut dyn FnMut(u64),
) -> io::Result<Option<File>> {
    let file = File::create(path)?;
    let (mut bytes, mut since) = (0, Instant::now());
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) => {}
        }
        let now = fs::metadata(written).map_or(0, |metadata| metadata.len());
        if now != bytes {
            (bytes, since) = (now, Instant::now());
        } else if since.elapsed() > stalled {
            return Ok(None);
        }
        waiting(bytes);
        thread::sleep(LOOK);
    }
}

/// The digest of a matrix: of what it is, and of the digests of its pieces.
fn digest(what: &str, bytes: &[u8], pool: &mut Pool) -> Hash {
    let mut digests = vec![Hash::default(); bytes.len().div_ceil(PIECE)];
    let (pieces, to) = (digests.len(), Disjoint::new(&mut digests));
    pool.run(pieces, &|_, piece| {
        let bytes = &bytes[piece * PIECE..];
        // SAFETY: each task has a digest of its own.
        let to = unsafe { to.slice(piece, 1) };
        to[0] = Sha256::digest(&bytes[..PIECE.min(bytes.len())]).into();
    });
    let mut hash = Sha256::new();
    hash.update((bytes.len() as u64).to_le_bytes());
    digests.iter().for_each(|digest| hash.update(digest));
    hash.update(what);
    hash.finalize().into()
}

/// A whole copy that is being used.
pub(super) struct Reader {
    path: PathBuf,
    mapped: MappedFile,
    length: usize,
    /// Where the next record begins.
    at: usize,
}

impl Reader {
    /// `None` if there is no copy, or one of something else.
    fn open(path: &Path, key: &Hash) -> io::Result<Option<Self>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let length = file.metadata()?.len() as usize;
        if length < HEADER_BYTES {
            return Ok(None);
        }
        let mapped = MappedFile::new(&file, length)?;
        // SAFETY: within the file. Copies are never changed in place; should somebody do so nevertheless, what is read has
        // been checked or is wrong, and should somebody cut it short, the process ends, as with a checkpoint's files.
        let header = unsafe { mapped.bytes(0, HEADER_BYTES) };
        if header.as_slice() != [MAGIC.as_slice(), key].concat() {
            return Ok(None);
        }
        // That it is in use; of no consequence where it may not be said.
        let _ = file.set_modified(SystemTime::now());
        Ok(Some(Self { path: path.to_owned(), mapped, length, at: HEADER_BYTES }))
    }

    /// The next matrix, whose digest has been checked.
    pub(super) fn next(&mut self, what: &str, length: usize, pool: &mut Pool) -> Result<Bytes, RuntimeError> {
        let damaged = |reason: &str| RuntimeError::PackedCopy {
            path: self.path.clone(),
            reason: format!("{what}: {reason}"),
        };
        let start = self.at + RECORD_BYTES;
        let end = start.checked_add(length).filter(|&end| end <= self.length);
        let end = end.ok_or_else(|| damaged("the file ends before it"))?;
        // SAFETY: within the file, as just checked; see `open`.
        let (record, bytes) =
            unsafe { (self.mapped.bytes(self.at, RECORD_BYTES), self.mapped.bytes(start, length)) };
        if record.as_slice()[32..40] != (length as u64).to_le_bytes() {
            return Err(damaged("its length is another"));
        }
        if record.as_slice()[..32] != digest(what, bytes.as_slice(), pool) {
            return Err(damaged("its digest is another"));
        }
        self.at = end.next_multiple_of(ALIGN);
        Ok(bytes)
    }
}

/// A copy that is being written. What has been written is used at once, from the file's memory.
pub(super) struct Writer {
    path: PathBuf,
    partial: PathBuf,
    file: File,
    _lock: File,
    key: Hash,
    mapped: MappedFile,
    /// Bytes that are mapped, and those that are written.
    room: usize,
    at: usize,
    scratch: Vec<u8>,
    whole: bool,
}

impl Writer {
    fn begin(path: PathBuf, partial: PathBuf, lock: File, key: Hash, room: usize) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.read(true).write(true).create(true).truncate(true).open(&partial)?;
        // The header comes last.
        file.write_all(&[0; HEADER_BYTES])?;
        let mapped = MappedFile::new(&file, room)?;
        let (at, scratch) = (HEADER_BYTES, Vec::new());
        Ok(Self { path, partial, file, _lock: lock, key, mapped, room, at, scratch, whole: false })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes what `fill` makes of `length` zeros.
    pub(super) fn append(
        &mut self,
        what: &str,
        length: usize,
        pool: &mut Pool,
        fill: &mut dyn FnMut(&mut [u8], &mut Pool),
    ) -> io::Result<Bytes> {
        let start = self.at + RECORD_BYTES;
        let end = start + length.next_multiple_of(ALIGN);
        if end > self.room {
            return Err(io::Error::other("it grows beyond all expectation"));
        }
        let record = &mut self.scratch;
        record.clear();
        record.resize(end - self.at, 0);
        fill(&mut record[RECORD_BYTES..][..length], pool);
        let digest = digest(what, &record[RECORD_BYTES..][..length], pool);
        record[..32].copy_from_slice(&digest);
        record[32..40].copy_from_slice(&(length as u64).to_le_bytes());
        self.file.write_all(record)?;
        self.at = end;
        // SAFETY: within what is mapped and, now, within the file, which nobody else writes.
        Ok(unsafe { self.mapped.bytes(start, length) })
    }

    /// Gives the copy its name; gives its length. Not waited for is that it reaches the disk: digests tell.
    pub(super) fn finish(mut self) -> io::Result<u64> {
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(MAGIC)?;
        self.file.write_all(&self.key)?;
        fs::rename(&self.partial, &self.path)?;
        self.whole = true;
        if let Some(folder) = self.path.parent() {
            remove_unused(folder);
        }
        Ok(self.at as u64)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.whole {
            // What was used of it stays mapped.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

/// Removes copies that nobody uses any more; those that cannot be looked at or removed stay.
fn remove_unused(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let used = entry.metadata().and_then(|metadata| metadata.modified());
        let age = used.ok().and_then(|used| SystemTime::now().duration_since(used).ok());
        let is_copy = path.extension().is_some_and(|ending| ending == "packed");
        if is_copy && age.is_some_and(|age| age > UNUSED) && fs::remove_file(&path).is_ok() {
            tracing::info!(path = %path.display(), "removed a packed copy that was not used for 30 days");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stuck_writer_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let (path, partial) = (folder.path().join("lock"), folder.path().join("part"));
        let stalled = Duration::from_millis(300);
        let held = lock(&path, &partial, stalled, &mut |_| {}).unwrap().unwrap();
        let (mut looked, begun) = (0_u64, Instant::now());
        let second = lock(&path, &partial, stalled, &mut |bytes| {
            assert_eq!(bytes, looked.min(10));
            looked += 1;
            // As long as it grows, it is no matter how long it takes.
            if looked <= 10 {
                fs::write(&partial, vec![0; looked as usize]).unwrap();
            }
        });
        assert!(second.unwrap().is_none());
        assert!(begun.elapsed() > stalled + 10 * LOOK, "{looked} looks");
        drop(held);
        assert!(lock(&path, &partial, stalled, &mut |_| panic!("it is free")).unwrap().is_some());
    }

    #[test]
    fn only_copies_long_unused_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let day = Duration::from_secs(24 * 3600);
        let files = [("old.packed", 31), ("used.packed", 29), ("model.gguf", 90)];
        for (name, days) in files {
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_modified(SystemTime::now() - days * day).unwrap();
        }
        remove_unused(folder.path());
        let left = files.map(|(name, _)| folder.path().join(name).exists());
        assert_eq!(left, [false, true, true]);
    }
}
