//! What placement is told to go by.

use std::time::Duration;

/// How an instance is chosen among those that could take a part of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Policy {
    /// The least time lost, to this request and to others, as it is predicted.
    #[default]
    Predicted,
    /// Of two that are drawn whoever has fewer sequences.
    PowerOfTwo,
    /// Whoever has the fewest sequences.
    LeastLoad,
    /// In turn.
    RoundRobin,
}

impl Policy {
    pub const ALL: [Self; 4] = [Self::Predicted, Self::PowerOfTwo, Self::LeastLoad, Self::RoundRobin];

    pub fn name(self) -> &'static str {
        match self {
            Self::Predicted => "predicted",
            Self::PowerOfTwo => "power_of_two",
            Self::LeastLoad => "least_load",
            Self::RoundRobin => "round_robin",
        }
    }
}

/// What is wanted of an answer: the cost of a place grows faster where it is predicted to miss this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Targets {
    /// Until the first token: so long, and so long for each 1,024 tokens of the prompt.
    pub ttft: Duration,
    pub ttft_per_1k_tokens: Duration,
    /// From each token to the next.
    pub tpot: Duration,
}

impl Targets {
    /// For a prompt of so many tokens.
    pub(crate) fn ttft(&self, prompt_tokens: u32) -> Duration {
        let of_the_prompt =
            u64::from(prompt_tokens).saturating_mul(self.ttft_per_1k_tokens.as_micros() as u64) / 1024;
        self.ttft.saturating_add(Duration::from_micros(of_the_prompt))
    }

    pub(crate) fn ttft_micros(&self, prompt_tokens: u32) -> f64 {
        self.ttft(prompt_tokens).as_secs_f64() * 1e6
    }

    pub(crate) fn tpot_micros(&self) -> f64 {
        self.tpot.as_secs_f64() * 1e6
    }
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    pub policy: Policy,
    /// 0: the cheapest is taken. Above, others are as well, by chance: one that costs this share more than the cheapest is
    /// taken about 0.37 times as often.
    pub temperature: f64,
    /// A decode instance may compute a prompt of which it has all but so many tokens at most, where that costs less than to hand
    /// its cache over; a longer one only where prefill would be late. 0 = none.
    pub local_prefill_tokens: u32,
    /// An instance that has just begun to take requests gets its full share of them only after this time.
    pub warm_up: Duration,
    pub targets: Targets,
    /// Requests wait in line while every instance would be longer than this until it computed their prompt, had KV blocks to
    /// begin their answer, or a place for it among those that it decodes.
    pub room: Duration,
    /// Coordinators of different seeds do not choose alike among equals.
    pub seed: u32,
    /// Most memory for who has which KV blocks cached.
    pub index_bytes: usize,
    /// Of what is cached one block for so many tokens is remembered ([`baton_proto::Sieve`]); 0 = every block.
    pub index_every_tokens: u32,
}

impl Settings {
    pub const DEFAULT: Self = Self {
        policy: Policy::Predicted,
        temperature: 0.0,
        local_prefill_tokens: 2_048,
        warm_up: Duration::from_secs(30),
        targets: Targets {
            ttft: Duration::from_secs(1),
            ttft_per_1k_tokens: Duration::from_millis(200),
            tpot: Duration::from_millis(50),
        },
        room: Duration::from_secs(15),
        seed: 0,
        index_bytes: 256 << 20,
        index_every_tokens: 128,
    };

    /// The same, but that every prompt is handed over.
    pub const APART: Self = Self { local_prefill_tokens: 0, ..Self::DEFAULT };
}

impl Default for Settings {
    fn default() -> Self {
        Self::DEFAULT
    }
}
