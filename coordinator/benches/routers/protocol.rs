//! What the measuring process says to the worker and to the load client: a line of JSON each, on their standard input, and
//! one back.

use serde::{Deserialize, Serialize};

use crate::words::Words;

/// How the worker is set up; `WorkerReady` answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct WorkerSetup {
    pub(crate) words: Words,
    /// So many instances of either role.
    pub(crate) pairs: u32,
}

/// Where an instance listens, `host:port`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Listens {
    pub(crate) id: String,
    pub(crate) grpc: String,
    pub(crate) http: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct WorkerReady {
    pub(crate) prefill: Vec<Listens>,
    pub(crate) decode: Vec<Listens>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FloorReady {
    /// `host:port`.
    pub(crate) address: String,
}

/// How fast the worker's engine steps from now on; [`Done`] answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Pace {
    /// From one step to the next; 0 = at once.
    pub(crate) step_micros: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Done {}

/// How a client's prompts are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Spelling {
    /// As the text of a chat.
    Chat,
    /// As token ids of a completion.
    Ids,
}

/// Requests to make. The client answers with [`Done`] once they are written, waits for [`Done`], makes them, and answers
/// with [`Outcome`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    /// `host:port`.
    pub(crate) address: String,
    pub(crate) spelling: Spelling,
    pub(crate) stream: bool,
    /// Requests at a time, on a connection each.
    pub(crate) streams: u32,
    /// Requests altogether.
    pub(crate) requests: u32,
    /// Of each prompt, as tokens that are a word each.
    pub(crate) prompt_words: u32,
    /// How many texts there are for prompts, sent in turn; a number in front of each makes every request's another prompt.
    pub(crate) texts: u32,
    /// They are drawn from this.
    pub(crate) texts_seed: u64,
    /// Numbers and answers are drawn from this.
    pub(crate) seed: u64,
    /// Over how long the first requests are spread, so that not all come in one burst for ever.
    pub(crate) ramp_micros: u64,
}

/// What became of a job. Times are in microseconds, in no order.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// From sending a request to the first text of its answer; of one that is not streamed, to its end.
    pub(crate) first_micros: Vec<u64>,
    /// From sending a request to the end of its answer.
    pub(crate) whole_micros: Vec<u64>,
    /// From the first request to the end of the last answer.
    pub(crate) wall_micros: u64,
    /// Bytes of all requests' bodies.
    pub(crate) body_bytes: u64,
    /// What was wrong with the first answer that was not as it should be.
    pub(crate) fault: Option<String>,
}
