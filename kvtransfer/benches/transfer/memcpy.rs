//! The yardstick of shared memory: copying as many bytes from one buffer of this process to another.

use std::{hint::black_box, time::Instant};

use crate::{error::BenchError, process::own_cpu_seconds, report::Sample};

pub(crate) struct Memcpy {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Memcpy {
    /// Between two buffers of that size, paged in.
    pub(crate) fn new(bytes: u64) -> Self {
        Self { from: vec![1; bytes as usize], to: vec![2; bytes as usize] }
    }

    /// Copies at least `bytes`.
    pub(crate) fn measure(&mut self, bytes: u64) -> Result<Sample, BenchError> {
        let times = bytes.div_ceil(self.from.len() as u64);
        let (cpu_before, started) = (own_cpu_seconds()?, Instant::now());
        for _ in 0..times {
            self.to.copy_from_slice(black_box(&self.from));
            black_box(&mut self.to);
        }
        let seconds = started.elapsed().as_secs_f64();
        let cpu_seconds = own_cpu_seconds()? - cpu_before;
        Ok(Sample { bytes: times * self.from.len() as u64, seconds, cpu_seconds })
    }
}
