//! The ACL runtime as far as transfers need it: a device's context, which each thread must set before it calls anything,
//! and streams. Used by [`super::hixl`] and [`super::hccl`]; memory is the model's device, not ours.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    fmt, io,
    path::PathBuf,
    ptr::null_mut,
    sync::Arc,
    time::Duration,
};

use super::library::{Search, Unavailable, functions};

functions! {
    /// `libacl_rt.so`. `aclError` is an `int`; streams and contexts are `void *`.
    AclFunctions {
        init = aclInit(*const c_char) -> c_int;
        set_device = aclrtSetDevice(i32) -> c_int;
        device_count = aclrtGetDeviceCount(*mut u32) -> c_int;
        current_context = aclrtGetCurrentContext(*mut *mut c_void) -> c_int;
        set_current_context = aclrtSetCurrentContext(*mut c_void) -> c_int;
        create_stream = aclrtCreateStream(*mut *mut c_void) -> c_int;
        destroy_stream = aclrtDestroyStream(*mut c_void) -> c_int;
        synchronize_stream = aclrtSynchronizeStreamWithTimeout(*mut c_void, i32) -> c_int;
        ? recent_error = aclGetRecentErrMsg() -> *const c_char;
        ? physical_device = aclrtGetPhyDevIdByLogicDevId(i32, *mut i32) -> c_int;
        ? destroy_stream_force = aclrtDestroyStreamForce(*mut c_void) -> c_int;
    }
}

/// Somebody in this process, e.g. the model's device, initialised the runtime before.
const INITIALISED_ALREADY: c_int = 100_002;
const SYNCHRONISE_TIMED_OUT: c_int = 107_020;

/// The runtime, opened and initialised. Never finalised: others in the process may use it.
pub(crate) struct Acl {
    functions: AclFunctions,
    pub(crate) file: PathBuf,
}

impl Acl {
    pub(crate) fn open(search: &Search) -> Result<Arc<Self>, Unavailable> {
        let library = search.open(&["libacl_rt.so", "libascendcl.so"])?;
        let functions = AclFunctions::load(&library)?;
        let acl = Self { functions, file: library.keep() };
        // SAFETY: NULL stands for the default configuration.
        let status = unsafe { (acl.functions.init)(std::ptr::null()) };
        if status != 0 && status != INITIALISED_ALREADY {
            let file = acl.file.display();
            let why = acl.failed("aclInit", i64::from(status));
            return Err(Unavailable::new(format!("{file} cannot be initialised: {why}")));
        }
        let devices = acl.device_count().map_err(|why| Unavailable::new(format!("no devices: {why}")))?;
        if devices == 0 {
            return Err(Unavailable::new("the runtime finds no device"));
        }
        Ok(Arc::new(acl))
    }

    fn device_count(&self) -> io::Result<u32> {
        let mut count = 0;
        // SAFETY: `count` may be written.
        self.check("aclrtGetDeviceCount", unsafe { (self.functions.device_count)(&mut count) })?;
        Ok(count)
    }

    /// Makes device `id` (as this process numbers them) usable, on this thread first.
    pub(crate) fn device(self: &Arc<Self>, id: u32) -> io::Result<Arc<Device>> {
        let id = i32::try_from(id).map_err(|_| io::Error::other("device ids end at 2147483647"))?;
        // SAFETY: a number; the runtime checks it.
        self.check("aclrtSetDevice", unsafe { (self.functions.set_device)(id) })?;
        let mut context = null_mut();
        // SAFETY: `context` may be written.
        self.check("aclrtGetCurrentContext", unsafe { (self.functions.current_context)(&mut context) })?;
        let physical = self.physical(id)?;
        Ok(Arc::new(Device { acl: self.clone(), context, physical }))
    }

    fn physical(&self, id: i32) -> io::Result<Option<u32>> {
        let Some(physical_device) = self.functions.physical_device else { return Ok(None) };
        let mut physical = -1;
        // SAFETY: `physical` may be written.
        self.check("aclrtGetPhyDevIdByLogicDevId", unsafe { physical_device(id, &mut physical) })?;
        Ok(u32::try_from(physical).ok())
    }

    fn check(&self, what: &'static str, status: c_int) -> io::Result<()> {
        if status == 0 { Ok(()) } else { Err(self.failed(what, i64::from(status))) }
    }

    /// An error that names the call, its status, and what the runtime last said on this thread.
    pub(crate) fn failed(&self, what: &str, status: i64) -> io::Error {
        let message = self.functions.recent_error.and_then(|recent_error| {
            // SAFETY: takes nothing; gives NULL or a C string that lives until this thread's next call.
            unsafe {
                let message = recent_error();
                (!message.is_null()).then(|| CStr::from_ptr(message).to_string_lossy().into_owned())
            }
        });
        match message.filter(|message| !message.trim().is_empty()) {
            Some(message) => {
                io::Error::other(format!("{what} failed with status {status}: {}", message.trim()))
            }
            None => io::Error::other(format!("{what} failed with status {status}")),
        }
    }
}

/// A device of this process, by its primary context.
pub(crate) struct Device {
    acl: Arc<Acl>,
    context: *mut c_void,
    /// The id that the network's configuration uses; the runtime's own ids may be a subset, numbered anew. `None` where
    /// the runtime is too old to say.
    pub(crate) physical: Option<u32>,
}

// SAFETY: a context may be set and used on any thread; the functions are callable from all of them.
unsafe impl Send for Device {}
// SAFETY: as above; nothing here is changed.
unsafe impl Sync for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("physical", &self.physical).finish_non_exhaustive()
    }
}

impl Device {
    /// Makes this device the calling thread's. Needed once on each thread before it calls a library; called before each
    /// use, as it is cheap and others in the process may have changed it.
    pub(crate) fn enter(&self) -> io::Result<()> {
        // SAFETY: the primary context of a device that was set, which is never destroyed.
        let status = unsafe { (self.acl.functions.set_current_context)(self.context) };
        self.acl.check("aclrtSetCurrentContext", status)
    }

    pub(crate) fn failed(&self, what: &str, status: i64) -> io::Error {
        self.acl.failed(what, status)
    }

    pub(crate) fn stream(self: &Arc<Self>) -> io::Result<Stream> {
        self.enter()?;
        let mut handle = null_mut();
        // SAFETY: `handle` may be written.
        let status = unsafe { (self.acl.functions.create_stream)(&mut handle) };
        self.acl.check("aclrtCreateStream", status)?;
        Ok(Stream { device: self.clone(), handle })
    }
}

/// A queue of the device. Only [`destroy`](Self::destroy) gives it back, so that whoever has one decides when.
pub(crate) struct Stream {
    device: Arc<Device>,
    handle: *mut c_void,
}

// SAFETY: a stream may be used from any thread that has set its context, by one at a time.
unsafe impl Send for Stream {}

impl Stream {
    pub(crate) fn handle(&self) -> *mut c_void {
        self.handle
    }

    /// Waits until all that was queued is done; false if it is not after `most`.
    pub(crate) fn synchronise(&self, most: Duration) -> io::Result<bool> {
        // Rounded up: 0 would spin, and a negative number means for ever.
        let most = i32::try_from(most.as_millis()).unwrap_or(i32::MAX).max(1);
        // SAFETY: a live stream.
        match unsafe { (self.device.acl.functions.synchronize_stream)(self.handle, most) } {
            0 => Ok(true),
            SYNCHRONISE_TIMED_OUT => Ok(false),
            status => Err(self.device.failed("aclrtSynchronizeStreamWithTimeout", status.into())),
        }
    }

    /// Whether the runtime is new enough to end a stream without waiting for what is queued.
    pub(crate) fn can_be_forced(&self) -> bool {
        self.device.acl.functions.destroy_stream_force.is_some()
    }

    /// Gives the stream up, by force where the runtime can. When it returns, no task of it runs any more.
    pub(crate) fn destroy(self) -> io::Result<()> {
        self.device.enter()?;
        let functions = &self.device.acl.functions;
        let destroy = functions.destroy_stream_force.unwrap_or(functions.destroy_stream);
        // SAFETY: a live stream, not used again: `self` ends here.
        self.device.acl.check("aclrtDestroyStream", unsafe { destroy(self.handle) })
    }
}
