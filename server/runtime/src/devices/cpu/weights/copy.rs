//! A copy on disk of a model's packed weights: the next load maps it instead of packing, and all servers of a host that
//! map it share its memory.
//!
//! ```text
//! copy   = magic (32 bytes), key (32), records
//! record = digest (32), length (u64, little endian), zeros up to 64 bytes, panels, zeros up to a multiple of 64
//! ```
//!
//! Records stand in the order in which the model asks for its matrices. A digest is over which matrix that is and over its
//! bytes; it is checked before they are used. A copy is written to a file of another name and takes its own when it is
//! whole; then it is never changed, only replaced. So a lock is needed for nothing but to save work: of several processes
//! that want a copy at once, one writes it and the others wait.

#[cfg(test)]
mod tests;

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process, thread,
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

/// Begins every copy, whatever its version.
const NAME: &str = "baton packed weights, ";
/// Stands behind [`NAME`]. To be changed whenever another file would be made of the same model: in `pack`, in the order in
/// which models load their matrices, here. A test with a digest of a whole copy says when.
const VERSION: &str = "1         ";
const HEADER_BYTES: usize = 64;
const RECORD_BYTES: usize = 64;
/// Bytes that are digested by one task, and written at once.
const PIECE: usize = 1 << 20;
/// How often a process that waits for another's copy looks at it, and how long it waits when nothing happens.
const LOOK: Duration = Duration::from_millis(50);
const STALLED: Duration = Duration::from_secs(60);
/// Copies that nobody has loaded for so long are removed when another is written, and what dead writers have left.
const UNUSED: Duration = Duration::from_secs(30 * 24 * 3600);

type Hash = [u8; 32];

/// Where the copy of a model packed in one way is, or would be.
pub(crate) struct Place {
    path: PathBuf,
    key: Hash,
}

/// What there is at a [`Place`].
pub(crate) enum Found {
    Copy(Reader),
    /// None yet, and this process is to write it.
    Nothing(Writer),
}

impl Place {
    /// Copies are of these very files: another length or time of change makes another copy.
    pub(crate) fn new(
        folder: &Path,
        checkpoint: &Checkpoint,
        exact_bf16: bool,
    ) -> Result<Self, RuntimeError> {
        let mut hash = Sha256::new();
        hash.update(NAME);
        hash.update(VERSION);
        hash.update([u8::from(exact_bf16)]);
        hash.update(checkpoint.revision()?);
        for path in checkpoint.files() {
            // A file that cannot be looked at will not be loaded either.
            let metadata = fs::metadata(path).ok();
            let changed = metadata.as_ref().and_then(|metadata| metadata.modified().ok());
            let age = changed.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
            hash.update(metadata.map_or(0, |metadata| metadata.len()).to_le_bytes());
            hash.update(age.map_or(0, |age| age.as_nanos()).to_le_bytes());
        }
        let key: Hash = hash.finalize().into();
        let short: String = key[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { path: folder.join(format!("{}-{short}.packed", checkpoint.name())), key })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn header(&self) -> Vec<u8> {
        [NAME.as_bytes(), VERSION.as_bytes(), &self.key].concat()
    }

    /// Finds the copy or begins one; waits for another process that writes it, unless that one gets stuck. `damaged` is the
    /// number of a copy that is of no use.
    pub(crate) fn find(&self, damaged: Option<u64>) -> io::Result<Found> {
        let usable = || Ok::<_, io::Error>(Reader::open(self)?.filter(|found| damaged != Some(found.number)));
        if let Some(reader) = usable()? {
            return Ok(Found::Copy(reader));
        }
        if let Some(folder) = self.path.parent() {
            let mut builder = DirBuilder::new();
            #[cfg(unix)]
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            builder.recursive(true).create(folder)?;
        }
        let lock = self.lock(STALLED)?;
        // Whoever had the lock may have finished.
        match usable()? {
            Some(reader) => Ok(Found::Copy(reader)),
            None => Ok(Found::Nothing(Writer::begin(self, lock)?)),
        }
    }

    /// Waits for the lock as long as its holder shows, by the file's time of change, that it goes on.
    fn lock(&self, stalled: Duration) -> io::Result<File> {
        let path = self.path.with_extension("lock");
        let file = private().create(true).truncate(false).open(&path)?;
        let (mut changed, mut since) = (None, Instant::now());
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(error),
                Err(TryLockError::WouldBlock) => {}
            }
            if changed.is_none() {
                tracing::info!(path = %self.path.display(), "another process packs this model: waiting for its copy");
            }
            let now = fs::metadata(&path).and_then(|metadata| metadata.modified()).ok();
            if now != changed {
                (changed, since) = (now, Instant::now());
            } else if since.elapsed() > stalled {
                let stuck = format!("who holds {} does not go on", path.display());
                return Err(io::Error::new(io::ErrorKind::TimedOut, stuck));
            }
            thread::sleep(LOOK);
        }
    }
}

/// A file to be written that nobody else may read or write.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// The digest of the matrix of that index: of what it is, and of the digests of its pieces.
fn digest(index: u64, what: &str, bytes: &[u8], pool: &mut Pool) -> Hash {
    let mut digests = vec![Hash::default(); bytes.len().div_ceil(PIECE)];
    let (pieces, to) = (digests.len(), Disjoint::new(&mut digests));
    pool.run(pieces, &|_, piece| {
        let bytes = &bytes[piece * PIECE..];
        // SAFETY: each task has a digest of its own.
        let to = unsafe { to.slice(piece, 1) };
        to[0] = Sha256::digest(&bytes[..PIECE.min(bytes.len())]).into();
    });
    let mut hash = Sha256::new();
    hash.update(index.to_le_bytes());
    hash.update((bytes.len() as u64).to_le_bytes());
    digests.iter().for_each(|digest| hash.update(digest));
    hash.update(what);
    hash.finalize().into()
}

/// A whole copy that is being used.
pub(crate) struct Reader {
    path: PathBuf,
    /// Which file it is, whatever its name.
    number: u64,
    mapped: MappedFile,
    /// Where the next record begins, and its index.
    at: usize,
    index: u64,
}

impl Reader {
    /// `None` if there is no copy, or one of something else, or one that is not to be trusted.
    fn open(place: &Place) -> io::Result<Option<Self>> {
        let file = match File::open(&place.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let metadata = file.metadata()?;
        if metadata.len() < HEADER_BYTES as u64 {
            return Ok(None);
        }
        if !is_ours(&metadata) {
            let path = place.path.display();
            tracing::warn!("the packed copy {path} is not used: others than this user may have written it");
            return Ok(None);
        }
        let mapped = MappedFile::new(&file)?;
        let header = mapped.bytes(0, HEADER_BYTES);
        if header.is_none_or(|header| header.as_slice() != place.header()) {
            return Ok(None);
        }
        // That it is in use; of no consequence where it may not be said.
        let _ = file.set_modified(SystemTime::now());
        let number = number(&metadata);
        Ok(Some(Self { path: place.path.clone(), number, mapped, at: HEADER_BYTES, index: 0 }))
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// The next matrix, whose digest has been checked.
    pub(super) fn next(&mut self, what: &str, length: usize, pool: &mut Pool) -> Result<Bytes, RuntimeError> {
        let damaged = |reason: &str| RuntimeError::PackedCopy {
            path: self.path.clone(),
            reason: format!("{what}: {reason}"),
        };
        let start = self.at + RECORD_BYTES;
        let found = self.mapped.bytes(self.at, RECORD_BYTES).zip(self.mapped.bytes(start, length));
        let (record, bytes) = found.ok_or_else(|| damaged("the file ends before it"))?;
        if record.as_slice()[32..40] != (length as u64).to_le_bytes() {
            return Err(damaged("its length is another"));
        }
        if record.as_slice()[..32] != digest(self.index, what, bytes.as_slice(), pool) {
            return Err(damaged("its digest is another"));
        }
        self.at = (start + length).next_multiple_of(ALIGN);
        self.index += 1;
        Ok(bytes)
    }
}

/// Whether only this user, or root, can have written a file.
#[cfg(unix)]
fn is_ours(metadata: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    let owner = metadata.uid();
    (owner == 0 || owner == rustix::process::geteuid().as_raw()) && metadata.mode() & 0o022 == 0
}

#[cfg(not(unix))]
fn is_ours(_: &fs::Metadata) -> bool {
    true
}

#[cfg(unix)]
fn number(metadata: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

#[cfg(not(unix))]
fn number(_: &fs::Metadata) -> u64 {
    0
}

/// A copy that is being written.
pub(crate) struct Writer {
    path: PathBuf,
    header: Vec<u8>,
    partial: Partial,
    file: File,
    lock: File,
    index: u64,
}

/// The file's name while it is not whole; gone when dropped, unless it has been renamed.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        // Not there if it has its own name by now.
        let _ = fs::remove_file(&self.0);
    }
}

impl Writer {
    fn begin(place: &Place, lock: File) -> io::Result<Self> {
        // Of others that had the lock before: dead, or about to find that theirs is gone.
        for path in files_beside(&place.path) {
            if stem_of(&path, "part").is_some_and(|stem| Some(stem) == stem_of(&place.path, "packed")) {
                let _ = fs::remove_file(path);
            }
        }
        let begun = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let path = place.path.with_extension(format!("{}-{begun}.part", process::id()));
        let mut file = private().create_new(true).open(&path)?;
        let partial = Partial(path);
        // The header comes last.
        file.write_all(&[0; HEADER_BYTES])?;
        Ok(Self { path: place.path.clone(), header: place.header(), partial, file, lock, index: 0 })
    }

    /// Writes the next matrix.
    pub(super) fn append(&mut self, what: &str, bytes: &[u8], pool: &mut Pool) -> io::Result<()> {
        self.goes_on();
        let mut record = [0; RECORD_BYTES];
        record[..32].copy_from_slice(&digest(self.index, what, bytes, pool));
        record[32..40].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.file.write_all(&record)?;
        for piece in bytes.chunks(16 * PIECE) {
            self.file.write_all(piece)?;
            self.goes_on();
        }
        self.file.write_all(&[0; ALIGN][..bytes.len().next_multiple_of(ALIGN) - bytes.len()])?;
        self.index += 1;
        Ok(())
    }

    /// Shows those who wait that there is progress.
    fn goes_on(&self) {
        // If it cannot be shown they will pack for themselves.
        let _ = self.lock.set_modified(SystemTime::now());
    }

    /// Gives the copy its name. Not waited for is that it reaches the disk: digests tell.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&self.header)?;
        fs::rename(&self.partial.0, &self.path)?;
        let bytes = self.file.metadata()?.len();
        tracing::info!(path = %self.path.display(), bytes, "packed copy written");
        remove_unused(&self.path);
        Ok(())
    }
}

/// All files of the folder that a path is in; none if it cannot be read.
fn files_beside(path: &Path) -> impl Iterator<Item = PathBuf> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Removes copies that nobody loads any more, and what dead writers have left; what cannot be looked at or removed stays.
fn remove_unused(path: &Path) {
    for path in files_beside(path) {
        let changed = fs::metadata(&path).and_then(|metadata| metadata.modified());
        let age = changed.ok().and_then(|changed| SystemTime::now().duration_since(changed).ok());
        if age.is_none_or(|age| age < UNUSED) {
            continue;
        }
        let left_over = ["part", "lock"].into_iter().any(|ending| stem_of(&path, ending).is_some());
        let unused = stem_of(&path, "packed").is_some() && is_copy(&path);
        if (left_over || unused) && fs::remove_file(&path).is_ok() {
            tracing::info!(path = %path.display(), "removed a packed copy that was not loaded for 30 days");
        }
    }
}

/// What the names of a copy, of its lock (`STEM.lock`) and of what is to become one (`STEM.N-N.part`) begin with: the
/// model's name and eight bytes of the key. `None` if it is no such name.
fn stem_of(path: &Path, ending: &str) -> Option<String> {
    let name = path.file_name()?.to_str()?.strip_suffix(ending)?.strip_suffix('.')?;
    let stem = if ending == "part" { name.rsplit_once('.')?.0 } else { name };
    let (_, key) = stem.rsplit_once('-')?;
    (key.len() == 16 && key.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| stem.to_owned())
}

/// Whether a file is a copy, of whatever version.
fn is_copy(path: &Path) -> bool {
    let mut name = [0; NAME.len()];
    let read = File::open(path).and_then(|mut file| io::Read::read_exact(&mut file, &mut name));
    read.is_ok() && name == NAME.as_bytes()
}
