//! See `baton_kvtransfer::fuzz::layouts`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| baton_kvtransfer::fuzz::layouts(bytes));
