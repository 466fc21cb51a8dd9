//! The program's heap: jemalloc, in huge pages.
//!
//! What thousands of requests keep lies all over the heap, and each token touches a little of it that was touched last a step
//! ago. In pages of 4 KiB that takes an entry of the processor's page tables for nearly every touch; in those of 2 MiB a few
//! entries reach all of it. See "Allocators" in the figures of `bench routers`.

use std::ffi::{CStr, c_char};

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// jemalloc's options, by the names of its manual. Huge pages have to be asked for, as most systems give them to none but who
/// does; where there are none, the others serve. What is free is given back after a minute: given back sooner, it is asked for
/// again by the next long prompt, which waits for zeros. `_RJEM_MALLOC_CONF` in the environment is read after this.
const OPTIONS: &CStr = c"thp:always,metadata_thp:always,dirty_decay_ms:60000";

/// A C string, as jemalloc reads it.
#[repr(transparent)]
struct Options(*const c_char);

// SAFETY: nobody ever writes to what it points to.
unsafe impl Sync for Options {}

// SAFETY: the name is jemalloc's, built with the prefix `_rjem_`, and this is what it takes the variable for: a `const char *`.
#[unsafe(export_name = "_rjem_malloc_conf")]
#[used]
static MALLOC_CONF: Options = Options(OPTIONS.as_ptr());
