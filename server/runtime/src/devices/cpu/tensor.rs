//! Activations: f32, row by row, in memory that is kept from step to step and grows with the largest.

use crate::RuntimeError;

/// Activations on the CPU.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub(super) values: Vec<f32>,
    pub(super) rows: usize,
    pub(super) width: usize,
}

impl Tensor {
    /// Without rows as yet.
    pub(super) fn new(width: usize) -> Self {
        Self { values: Vec::new(), rows: 0, width }
    }

    /// The values of `rows` rows, to be written.
    pub(super) fn reset(&mut self, rows: usize) -> Result<&mut [f32], RuntimeError> {
        let length = rows.saturating_mul(self.width);
        if let Some(more) = length.checked_sub(self.values.len()) {
            let exhausted = |_| RuntimeError::Activations { bytes: length.saturating_mul(size_of::<f32>()) };
            self.values.try_reserve_exact(more).map_err(exhausted)?;
            self.values.resize(length, 0.0);
        }
        self.rows = rows;
        Ok(&mut self.values[..length])
    }

    pub(super) fn values(&self) -> &[f32] {
        &self.values[..self.rows * self.width]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_allocated_is_an_error_and_leaves_what_was_there() {
        let mut tensor = Tensor::new(1 << 20);
        tensor.reset(1).expect("a little").fill(1.0);
        for rows in [1 << 30, 1 << 40, usize::MAX] {
            let error = tensor.reset(rows).expect_err("more than there is");
            assert!(matches!(error, RuntimeError::Activations { bytes } if bytes > 1 << 50), "{error}");
        }
        assert_eq!(tensor.values(), vec![1.0; 1 << 20]);
    }
}
