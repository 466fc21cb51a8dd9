//! A line through what was measured, coefficient by coefficient not below zero. Pure.
//!
//! Least squares over samples that are forgotten by and by: the sums that make up the normal equations are kept, and each
//! new sample takes away a part of what is in them. What is known beforehand counts as a sample, or a part of one, along each
//! axis. The equations are solved one coefficient at a time, each kept from falling below zero, until they stand still:
//! nobody's work takes less time the more there is of it, however noise has it.

/// What is left of a sample's weight with each that follows: the last fifty count.
const KEPT: f64 = 0.98;
/// Rounds over the coefficients, at a time.
const ROUNDS: usize = 32;

/// The sums over samples of `N` features.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fit<const N: usize> {
    products: [[f64; N]; N],
    targets: [f64; N],
    /// Of the features, over the samples that count.
    means: [f64; N],
    /// How much samples count for together: less than they are, as they are forgotten.
    weight: f64,
    samples: u32,
}

impl<const N: usize> Default for Fit<N> {
    fn default() -> Self {
        Self { products: [[0.0; N]; N], targets: [0.0; N], means: [0.0; N], weight: 0.0, samples: 0 }
    }
}

impl<const N: usize> Fit<N> {
    /// How many samples there were.
    pub(super) fn samples(&self) -> u32 {
        self.samples
    }

    /// So much is left of what samples count, of 1.
    pub(super) fn fade(&mut self, left: f64) {
        self.weight *= left;
        self.targets = self.targets.map(|sum| sum * left);
        self.products = self.products.map(|sums| sums.map(|sum| sum * left));
    }

    /// For features `x`, scaled to about 1, `y` was measured.
    pub(super) fn learn(&mut self, x: [f64; N], y: f64) {
        self.samples = self.samples.saturating_add(1);
        self.weight = KEPT * self.weight + 1.0;
        for i in 0..N {
            self.means[i] += (x[i] - self.means[i]) / self.weight;
            self.targets[i] = KEPT * self.targets[i] + x[i] * y;
            for j in 0..N {
                self.products[i][j] = KEPT * self.products[i][j] + x[i] * x[j];
            }
        }
    }

    /// The coefficients, of which `before` was known, as surely as from so many samples along each axis. They are looked for from
    /// there on: where samples hardly tell one from another, the rounds of several calls bring them apart, each from the last.
    pub(super) fn solve(&self, before: [f64; N], samples: f64) -> [f64; N] {
        let mut line = before;
        if self.samples == 0 {
            return line;
        }
        for _ in 0..ROUNDS {
            for i in 0..N {
                let others: f64 = (0..N).filter(|j| *j != i).map(|j| self.products[i][j] * line[j]).sum();
                let wanted = self.targets[i] + samples * before[i] - others;
                line[i] = (wanted / (self.products[i][i] + samples)).max(0.0);
            }
        }
        line
    }

    /// `line`, made to say at the features of these samples what is within this factor of what `like` says.
    pub(super) fn near(&self, line: [f64; N], like: [f64; N], factor: f64) -> [f64; N] {
        let (said, expected) = (predicted(line, self.means), predicted(like, self.means));
        if said <= 0.0 || expected <= 0.0 {
            return like;
        }
        let bounded = said.clamp(expected / factor, expected * factor);
        line.map(|coefficient| coefficient * bounded / said)
    }
}

/// What the line says for features `x`.
pub(super) fn predicted<const N: usize>(line: [f64; N], x: [f64; N]) -> f64 {
    line.iter().zip(x).map(|(coefficient, x)| coefficient * x).sum()
}
