//! See `baton_kvtransfer::fuzz::connection`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| baton_kvtransfer::fuzz::connection(bytes));
