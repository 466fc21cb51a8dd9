//! The program's heap: jemalloc, in huge pages.
//!
//! What thousands of requests keep lies all over the heap, and each token touches a little of it that was touched last a step
//! ago. Where an address of 4 KiB pages lies in memory is looked up for nearly every touch, on a virtual machine in two tables;
//! of pages of 2 MiB the processor remembers enough of them. See "Allocators" in the figures of `bench routers`.

use std::{
    ffi::{CStr, c_char},
    sync::atomic::AtomicPtr,
};

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// jemalloc's options, by the names of its manual. Huge pages have to be asked for, as most systems give them to none but who
/// does; where there are none, the others serve. What is free is given back within a minute of use, bit by bit: given back
/// sooner, it is asked for again by the next long prompt, which waits for zeros. `_RJEM_MALLOC_CONF` in the environment is read
/// after this. How jemalloc is built is in `.cargo/config.toml`.
const OPTIONS: &CStr = c"thp:always,metadata_thp:always,dirty_decay_ms:60000";

/// Read once, when the program asks for memory first.
// SAFETY: the name is jemalloc's, built with the prefix `_rjem_`, and this is what it takes the variable for: a pointer to a C
// string.
#[unsafe(export_name = "_rjem_malloc_conf")]
#[used]
static MALLOC_CONF: AtomicPtr<c_char> = AtomicPtr::new(OPTIONS.as_ptr().cast_mut());
