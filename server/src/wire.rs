//! How busy an instance is, as the controller and the coordinators are told it: [`crate::session`] and
//! [`crate::inference`] send it.

use std::time::Duration;

use baton_proto::v1;

use crate::engine::load::Load;

impl From<&Load> for v1::InstanceLoad {
    fn from(load: &Load) -> Self {
        let occupancy = &load.occupancy;
        Self {
            running_sequences: occupancy.running,
            waiting_sequences: occupancy.waiting,
            waiting_room: Some(occupancy.waiting_room),
            queued_prefill_tokens: occupancy.queued_prefill_tokens,
            queued_prefill_pairs: occupancy.queued_prefill_pairs,
            kv_blocks_total: occupancy.blocks_total,
            kv_blocks_free: occupancy.blocks_free,
            prefill_tokens_per_second: load.prefill_tokens_per_second as u64,
            decode_step_micros: micros(load.decode_step),
            outgoing_transfers: occupancy.sending,
            incoming_transfers: occupancy.receiving,
            prefilled_requests: load.done.prompts,
            prefilled_tokens: load.done.prefill_tokens,
            decoded_tokens: load.done.decode_tokens,
            decode_steps: load.done.decode_steps,
            finished_requests: load.done.requests,
            finished_tokens: load.done.completion_tokens,
            max_sequences: occupancy.places,
            failed_requests: load.done.failed,
            finished_transfers_out: load.done.outgoing.whole,
            finished_transfers_in: load.done.incoming.whole,
            failed_transfers_out: load.done.outgoing.broken,
            failed_transfers_in: load.done.incoming.broken,
            progress: load.done.progress,
            accepted_requests: occupancy.counts.accepted.requests,
            accepted_prompt_tokens: occupancy.counts.accepted.prompt_tokens,
            accepted_choices: occupancy.counts.accepted.choices,
            // Said by who knows the stream.
            seen_leg: None,
            prefill_micros: micros(load.done.timed.prefill),
            timed_prefill_tokens: load.done.timed.prefill_tokens,
            timed_prefill_pairs: load.done.timed.prefill_pairs,
            decode_micros: micros(load.done.timed.decode),
            timed_decode_steps: load.done.timed.decode_steps,
            decode_sequences: load.done.timed.decode_sequences,
            decode_context_tokens: load.done.timed.context_tokens,
            timed_prefill_steps: load.done.timed.prefill_steps,
            max_batch_tokens: occupancy.batch_tokens,
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
