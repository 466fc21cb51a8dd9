//! Baton as it is measured: one server, role `mixed`, so that batching, paging, sampling and the wire are all in the
//! figures.

use std::{path::Path, time::Instant};

use baton_proto::v1::{self, dispatch::Work as Leg};

use super::{
    super::{
        prompt::mix,
        server::{Server, ServerError, prompt_tokens},
    },
    EngineError, Rates, Work,
};

/// The KV cache's blocks are counted by this many tokens at least.
const SMALLEST_BLOCK: u32 = 16;

pub(super) struct Baton {
    server: Server,
    vocabulary: u32,
}

impl Baton {
    /// Starts the server beside this program and waits until it serves.
    pub(super) async fn start(
        model: &Path,
        vocabulary: u32,
        threads: u16,
        works: &[Work],
        set: &[String],
    ) -> Result<Self, EngineError> {
        let blocks =
            |work: &Work| work.sequences * ((work.prompt_tokens + work.decode_tokens) / SMALLEST_BLOCK + 4);
        let mut settings = vec![
            format!("runtime.threads={threads}"),
            format!("runtime.kv_blocks={}", works.iter().map(blocks).max().unwrap_or(1)),
        ];
        settings.extend_from_slice(set);
        Ok(Self { server: Server::start(model, "mixed", &settings).await?, vocabulary })
    }

    /// Prefill is timed to the last sequence's first token; decode from there to the first sequence's end, when every
    /// sequence is in every step.
    pub(super) async fn measure(&mut self, work: Work, seed: u32) -> Result<Rates, EngineError> {
        let first = self.server.next_leg();
        let begin = Instant::now();
        for nth in 0..u64::from(work.sequences) {
            // A prompt that no leg had before: none of it is in the prefix cache.
            let seed = mix(seed.into()) ^ (first + nth);
            let prompt = prompt_tokens(self.vocabulary, seed, work.prompt_tokens);
            // Sequences that begin first go on while the others are still prefilled: a step each.
            let tokens = 1 + work.decode_tokens + work.sequences * 2;
            self.server.dispatch(prompt, tokens, Leg::Whole(v1::dispatch::Whole {})).await?;
        }
        let mut counts = vec![0_usize; work.sequences as usize];
        let (mut ended, mut all_began, mut window) = (0, None, None);
        while ended < work.sequences {
            let legs = self.server.step().await?;
            let now = Instant::now();
            for leg in legs {
                counts[(leg.leg - first) as usize] += leg.tokens.len();
                ended += u32::from(leg.end.is_some());
            }
            let total: usize = counts.iter().sum();
            if all_began.is_none() && counts.iter().all(|&count| count > 0) {
                all_began = Some((now, total));
            }
            if ended > 0 && window.is_none() {
                window = Some((now, total));
            }
        }
        let ((began, at_first), (ended, at_end)) =
            all_began.zip(window).ok_or_else(|| ServerError::Refused("it sent no tokens".to_owned()))?;
        Ok(Rates {
            prefill: f64::from(work.sequences * work.prompt_tokens) / (began - begin).as_secs_f64(),
            decode: (at_end - at_first) as f64 / (ended - began).as_secs_f64(),
        })
    }

    pub(super) async fn stop(self) {
        self.server.stop().await;
    }
}
