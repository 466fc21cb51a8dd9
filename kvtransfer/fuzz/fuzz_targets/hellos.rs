//! See `baton_kvtransfer::fuzz::hellos`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| baton_kvtransfer::fuzz::hellos(bytes));
