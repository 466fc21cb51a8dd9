//! libibverbs, found when it is first asked for: a machine without it has no RDMA, which is no reason not to build or run.

use std::{
    error::Error,
    ffi::{CStr, c_char, c_int, c_void},
    sync::OnceLock,
};

use libloading::os::unix;

use super::{abi, unavailable::Unavailable};

const NAME: &str = "libibverbs.so.1";

/// The functions of the library. Those that return an integer return an error number, or 0; those that return a
/// pointer return null and set `errno`.
pub(super) struct Library {
    pub(super) get_device_list: unsafe extern "C" fn(*mut c_int) -> *mut *mut abi::RawDevice,
    pub(super) free_device_list: unsafe extern "C" fn(*mut *mut abi::RawDevice),
    pub(super) get_device_name: unsafe extern "C" fn(*mut abi::RawDevice) -> *const c_char,
    pub(super) open_device: unsafe extern "C" fn(*mut abi::RawDevice) -> *mut abi::RawContext,
    pub(super) close_device: unsafe extern "C" fn(*mut abi::RawContext) -> c_int,
    pub(super) query_device: unsafe extern "C" fn(*mut abi::RawContext, *mut abi::DeviceAttributes) -> c_int,
    pub(super) query_port: unsafe extern "C" fn(*mut abi::RawContext, u8, *mut abi::PortAttributes) -> c_int,
    pub(super) query_gid_table:
        unsafe extern "C" fn(*mut abi::RawContext, *mut abi::GidEntry, usize, u32, usize) -> isize,
    pub(super) alloc_pd: unsafe extern "C" fn(*mut abi::RawContext) -> *mut abi::RawProtectionDomain,
    pub(super) dealloc_pd: unsafe extern "C" fn(*mut abi::RawProtectionDomain) -> c_int,
    pub(super) reg_mr_iova: unsafe extern "C" fn(
        *mut abi::RawProtectionDomain,
        *mut c_void,
        usize,
        u64,
        c_int,
    ) -> *mut abi::RawMemoryRegion,
    pub(super) dereg_mr: unsafe extern "C" fn(*mut abi::RawMemoryRegion) -> c_int,
    pub(super) create_cq: unsafe extern "C" fn(
        *mut abi::RawContext,
        c_int,
        *mut c_void,
        *mut c_void,
        c_int,
    ) -> *mut abi::RawCompletionQueue,
    pub(super) destroy_cq: unsafe extern "C" fn(*mut abi::RawCompletionQueue) -> c_int,
    pub(super) create_qp:
        unsafe extern "C" fn(*mut abi::RawProtectionDomain, *mut abi::NewQueuePair) -> *mut abi::RawQueuePair,
    pub(super) modify_qp:
        unsafe extern "C" fn(*mut abi::RawQueuePair, *mut abi::QueuePairAttributes, c_int) -> c_int,
    pub(super) destroy_qp: unsafe extern "C" fn(*mut abi::RawQueuePair) -> c_int,
    wc_status_str: unsafe extern "C" fn(c_int) -> *const c_char,
}

impl Library {
    /// This process's library; opened by whoever asks first, and never closed.
    pub(super) fn get() -> Result<&'static Self, Unavailable> {
        static LIBRARY: OnceLock<Result<Library, Unavailable>> = OnceLock::new();
        LIBRARY.get_or_init(|| Self::open(NAME)).as_ref().map_err(Clone::clone)
    }

    pub(super) fn open(name: &str) -> Result<Self, Unavailable> {
        // What failed is in the error, why in its source.
        let missing = |error: libloading::Error| {
            Unavailable::Library(error.source().map_or_else(|| error.to_string(), ToString::to_string))
        };
        // SAFETY: the library's initialisers only set up its own tables; it runs no code of ours.
        let library = unsafe { unix::Library::open(Some(name), unix::RTLD_NOW | unix::RTLD_LOCAL) };
        let library = library.map_err(missing)?;
        macro_rules! symbols {
            ($($field:ident: $symbol:literal),* $(,)?) => {
                Self { $(
                    // SAFETY: the field has the type of the function that libibverbs.so.1 has under this name. The
                    // pointer stays valid: the library is never closed.
                    $field: unsafe { *library.get($symbol.as_bytes()).map_err(missing)? },
                )* }
            };
        }
        let symbols = symbols! {
            get_device_list: "ibv_get_device_list",
            free_device_list: "ibv_free_device_list",
            get_device_name: "ibv_get_device_name",
            open_device: "ibv_open_device",
            close_device: "ibv_close_device",
            query_device: "ibv_query_device",
            query_port: "ibv_query_port",
            query_gid_table: "_ibv_query_gid_table",
            alloc_pd: "ibv_alloc_pd",
            dealloc_pd: "ibv_dealloc_pd",
            reg_mr_iova: "ibv_reg_mr_iova",
            dereg_mr: "ibv_dereg_mr",
            create_cq: "ibv_create_cq",
            destroy_cq: "ibv_destroy_cq",
            create_qp: "ibv_create_qp",
            modify_qp: "ibv_modify_qp",
            destroy_qp: "ibv_destroy_qp",
            wc_status_str: "ibv_wc_status_str",
        };
        std::mem::forget(library);
        Ok(symbols)
    }

    /// What the status of a completion means.
    pub(super) fn describe(&self, status: c_int) -> &'static str {
        // SAFETY: takes any number, and returns one of the library's constant strings.
        let text = unsafe { (self.wc_status_str)(status) };
        if text.is_null() {
            return "unknown";
        }
        // SAFETY: a constant of the library, which ends with a zero and is never unloaded.
        unsafe { CStr::from_ptr(text) }.to_str().unwrap_or("unknown")
    }
}
