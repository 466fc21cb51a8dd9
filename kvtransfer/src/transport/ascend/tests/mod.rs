//! The bindings against the emulator, with the other side in a process of its own: this test binary, started again.
//!
//! The emulator is a dev-dependency, so Cargo builds its shared object beside the test binary before this runs. It is
//! linked under the libraries' names, never loaded twice, and there is one for all tests of a process: they take turns.

mod hccl;
mod hixl;
mod peer;
mod probe;

use std::{
    ffi::{CString, c_char, c_int, c_void},
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    ptr::{NonNull, null_mut},
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use baton_ascend_emulator::fault::{self, Fault};
use libloading::os::unix::Library;
use tempfile::TempDir;

use super::{Ascend, Hccl, Hixl, Search, probe};
use crate::Region;

const ALL_NAMES: [&str; 3] = ["libacl_rt.so", "libcann_hixl.so", "libhcomm.so"];

/// Where Cargo puts what the tests of this crate depend on.
fn emulator_file() -> PathBuf {
    let test = std::env::current_exe().expect("this test");
    let file = test.with_file_name("libbaton_ascend_emulator.so");
    assert!(file.exists(), "{} is built with the tests", file.display());
    file
}

/// A folder in which the emulator is found under these names.
fn installed(names: &[&str]) -> TempDir {
    let folder = TempDir::new().expect("a folder");
    for name in names {
        // Links, so that the loader sees one library: what it keeps is shared by all three names.
        symlink(emulator_file(), folder.path().join(name)).expect("a link");
    }
    folder
}

/// The emulator, and what the tests need of it beside the bindings.
struct Emulator {
    ascend: Ascend,
    malloc: unsafe extern "C" fn(*mut *mut c_void, usize, c_int) -> c_int,
    free: unsafe extern "C" fn(*mut c_void) -> c_int,
    copy: unsafe extern "C" fn(*mut c_void, usize, *const c_void, usize, c_int) -> c_int,
    set_fault: unsafe extern "C" fn(*const c_char) -> c_int,
    count: unsafe extern "C" fn(*const c_char) -> u64,
}

static EMULATOR: LazyLock<Emulator> = LazyLock::new(|| {
    let folder = installed(&ALL_NAMES);
    let ascend = probe(&Search::only(folder.path()));
    // SAFETY: the emulator has nothing that runs when it is loaded, and is loaded already.
    let library = unsafe { Library::new(emulator_file()) }.expect("the emulator");
    // SAFETY: these are the functions' signatures.
    let emulator = unsafe {
        Emulator {
            ascend,
            malloc: *library.get("aclrtMalloc").expect("there"),
            free: *library.get("aclrtFree").expect("there"),
            copy: *library.get("aclrtMemcpy").expect("there"),
            set_fault: *library.get(fault::SET).expect("there"),
            count: *library.get(fault::COUNT).expect("there"),
        }
    };
    std::mem::forget(library);
    emulator
});

impl Emulator {
    fn hixl(&self) -> &Arc<Hixl> {
        self.ascend.hixl.as_ref().expect("installed")
    }

    fn hccl(&self) -> &Arc<Hccl> {
        self.ascend.hccl.as_ref().expect("installed")
    }

    fn count(&self, name: &str) -> u64 {
        let name = CString::new(name).expect("a name");
        // SAFETY: a C string.
        unsafe { (self.count)(name.as_ptr()) }
    }

    /// Device memory full of zeros.
    fn memory(&'static self, len: usize) -> Arc<DeviceMemory> {
        self.hixl().device(0).expect("a device").enter().expect("a context");
        let mut start = null_mut();
        // SAFETY: `start` may be written.
        assert_eq!(unsafe { (self.malloc)(&mut start, len, 0) }, 0);
        Arc::new(DeviceMemory { emulator: self, start: NonNull::new(start.cast()).expect("memory"), len })
    }
}

/// One test's turn with the emulator, which ends without a fault.
struct Turn {
    emulator: &'static Emulator,
    _turn: MutexGuard<'static, ()>,
}

fn turn() -> Turn {
    static TURNS: Mutex<()> = Mutex::new(());
    let turn = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
    Turn { emulator: &EMULATOR, _turn: turn }
}

impl Turn {
    fn fault(&self, fault: Fault) {
        self.set(fault.name());
    }

    fn set(&self, name: &str) {
        let name = CString::new(name).expect("a name");
        // SAFETY: a C string.
        assert_eq!(unsafe { (self.emulator.set_fault)(name.as_ptr()) }, 0);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.set("");
    }
}

impl std::ops::Deref for Turn {
    type Target = &'static Emulator;

    fn deref(&self) -> &Self::Target {
        &self.emulator
    }
}

/// What `aclrtMalloc` gave.
struct DeviceMemory {
    emulator: &'static Emulator,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an address; the runtime's functions may be called from any thread.
unsafe impl Send for DeviceMemory {}
// SAFETY: as above; the tests write to it only while no transfer has it.
unsafe impl Sync for DeviceMemory {}

impl DeviceMemory {
    fn region(self: &Arc<Self>) -> Region {
        // SAFETY: alive for as long as its owner; the tests leave it alone while a transfer has it.
        unsafe { Region::new(self.clone(), self.start, self.len) }
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.len);
        // SAFETY: inside.
        unsafe { self.start.add(offset) }
    }

    fn write(&self, bytes: &[u8]) {
        const TO_DEVICE: c_int = 1;
        let (to, from) = (self.start.as_ptr().cast(), bytes.as_ptr().cast());
        // SAFETY: both are valid for as many bytes; the runtime checks the room.
        assert_eq!(unsafe { (self.emulator.copy)(to, self.len, from, bytes.len(), TO_DEVICE) }, 0);
    }

    fn read(&self) -> Vec<u8> {
        const TO_HOST: c_int = 2;
        let mut bytes = vec![0u8; self.len];
        let (to, from) = (bytes.as_mut_ptr().cast(), self.start.as_ptr().cast());
        // SAFETY: both are valid for `len` bytes.
        assert_eq!(unsafe { (self.emulator.copy)(to, self.len, from, self.len, TO_HOST) }, 0);
        bytes
    }

    /// What it holds, if nobody writes to it. A look is not a proof, but the emulator's faults write without pause, so
    /// one that went on would be seen in a fraction of this time.
    fn quiet(&self) -> Vec<u8> {
        let (first, until) = (self.read(), Instant::now() + Duration::from_millis(30));
        while Instant::now() < until {
            assert!(self.read() == first, "memory is written after the error was returned");
        }
        first
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: from `aclrtMalloc`, freed once.
        assert_eq!(unsafe { (self.emulator.free)(self.start.as_ptr().cast()) }, 0);
    }
}

/// Bytes in which a wrong offset shows.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 13) as u8 | 1).collect()
}

/// A bound for what must happen at once; generous, as the machine may be busy.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A file that is no library.
fn write_junk(folder: &Path, name: &str) {
    fs::write(folder.join(name), "not a library").expect("a file");
}
