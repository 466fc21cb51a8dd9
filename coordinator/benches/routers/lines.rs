//! What is measured, a line of the tables each.

use std::fmt;

use clap::ValueEnum;

/// From one step of the worker's engine to the next.
pub(crate) const STEP_MICROS: u64 = 5_000;
const SLOW_STEP_MICROS: u64 = 500_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Prompt {
    /// About 30 tokens.
    Short,
    /// About 32,768 tokens.
    #[value(name = "32k")]
    Tokens32k,
    /// About 220 KB of text.
    #[value(name = "220KB")]
    Bytes220k,
}

impl Prompt {
    /// Its length in words of a token each, which have some 6 bytes.
    pub(crate) fn words(self) -> u32 {
        match self {
            Self::Short => 24,
            Self::Tokens32k => 32_700,
            Self::Bytes220k => 32_000,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Tokens32k => "32k",
            Self::Bytes220k => "220 KB",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Answer {
    /// Streamed, a token every 5 ms.
    Paced,
    /// Streamed, as fast as may be.
    Unpaced,
    /// Not streamed, as fast as may be.
    Whole,
    /// Not streamed, a token every 5 ms.
    WholePaced,
    /// Streamed, a token every 500 ms: for more streams than two cores keep busy.
    Slow,
}

impl Answer {
    pub(crate) fn is_streamed(self) -> bool {
        matches!(self, Self::Paced | Self::Unpaced | Self::Slow)
    }

    pub(crate) fn step_micros(self) -> u64 {
        match self {
            Self::Paced | Self::WholePaced => STEP_MICROS,
            Self::Slow => SLOW_STEP_MICROS,
            Self::Unpaced | Self::Whole => 0,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Paced => "paced",
            Self::Unpaced => "unpaced",
            Self::Whole => "not streamed",
            Self::WholePaced => "not streamed, paced",
            Self::Slow => "slow",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Line {
    pub(crate) prompt: Prompt,
    pub(crate) answer: Answer,
    pub(crate) streams: u32,
}

impl fmt::Display for Line {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}, {}, {}", self.prompt.name(), self.answer.name(), self.streams)
    }
}

impl Line {
    /// All that are asked for. Long prompts are measured where it matters that they are long.
    pub(crate) fn all(prompts: &[Prompt], answers: &[Answer], streams: &[u32]) -> Vec<Self> {
        let mut lines = Vec::new();
        for prompt in prompts {
            for answer in answers {
                let measured = match prompt {
                    Prompt::Short => true,
                    Prompt::Tokens32k => *answer == Answer::Paced,
                    Prompt::Bytes220k => *answer == Answer::Whole,
                };
                if measured {
                    lines.extend(streams.iter().map(|streams| Self {
                        prompt: *prompt,
                        answer: *answer,
                        streams: *streams,
                    }));
                }
            }
        }
        lines
    }

    /// Enough that their processor time is measurable, and that what grows with the first long prompts is little beside all of
    /// them; few enough that a round ends.
    pub(crate) fn requests(&self) -> u32 {
        let (least, each) = match (self.prompt, self.answer) {
            (Prompt::Short, Answer::Paced | Answer::WholePaced) => (12, 8),
            (Prompt::Short, Answer::Slow) => (1, 1),
            (Prompt::Short, Answer::Unpaced) => (300, 6),
            (Prompt::Short, Answer::Whole) => (1_000, 8),
            (Prompt::Tokens32k, _) => (16, 8),
            (Prompt::Bytes220k, _) => (1_000, 8),
        };
        (self.streams * each).max(least)
    }

    /// The first requests are spread over the time of one where that time is the engine's.
    pub(crate) fn ramp_micros(&self) -> u64 {
        self.answer.step_micros() * u64::from(crate::words::ANSWER_TOKENS)
    }
}
