//! What each part of a request's work would cost on an instance: predicted microseconds that are lost to somebody, so that
//! unlike machines compare. Pure.
//!
//! - **Prefill**: what is queued there, the time T of what is to be computed of this prompt, and `waiting` times T again:
//!   so many requests stand in the line of prefill, on average, while the instance computes it. So where little is to do the
//!   fastest answer is taken, and where there is much, whoever has least to compute: a cached prefix is worth more then. As
//!   long again as its own time, scaled by the shortfall, when the free KV blocks do not hold it.
//! - **Decode**: the tokens expected x the step with this request in the batch, each sequence of which attends to all that it has,
//!   whether or not others have the same blocks; the time by which it makes the steps of the others in it longer; as long again
//!   as its own steps, scaled by the shortfall, when the free KV blocks do not hold it; the time until others have ended, where as
//!   many are decoded as may be; and the time that what is not cached there takes to be moved, with the transfers that share the
//!   way. For what is queued there to be computed it stands still.
//! - **Both on one instance**: the sum, with nothing moved. A prompt that is computed where others are decoded, on a mixed
//!   instance as on one of decode, holds up every sequence of the batch, and is paid for so; between its chunks the batch
//!   decodes, and it waits for that.
//! - What is predicted to be later than its target counts [`LATE`] times more: of the first token by what is left of that since
//!   the request came. What it is late already is nobody's choice any more.
//! - What an instance has counts for more while it warms up: beside older peers it is given a share that grows with the time it
//!   has served. What is predicted of it, how long it makes anybody wait and how long its steps are, is not more for that.
//! - Of several choices each is decoded, and the prompt is computed once.

use baton_proto::attention_pairs;
use tokio::time::Instant;

use crate::{
    Ask, Side,
    fleet::Role,
    settings::Settings,
    view::{Model, Row},
};

/// How much more a microsecond counts that is beyond the target.
const LATE: f64 = 4.0;
/// At most so many are taken to stand in line behind a prompt.
const WAITING_MOST: f64 = 16.0;
/// What is taken for the link to any decode instance.
const LINK_BYTES_PER_MICROSECOND: f64 = 10_000.0;
/// The share of its peers' work that an instance gets at once.
const SHARE_LEAST: f64 = 0.1;
/// A decode instance computes no prompt itself that would leave less of its blocks free.
const LOCAL_FREE_LEAST: f64 = 0.1;

/// A price, and what it follows from.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Price {
    /// All that is lost.
    pub(crate) micros: f64,
    /// Until the first token, where the part has one to give.
    pub(crate) ttft_micros: f64,
    /// From one token to the next, where it gives more.
    pub(crate) tpot_micros: f64,
    /// Until it is begun with.
    pub(crate) wait_micros: f64,
    /// The first token would come later than it should, and would not if nothing were queued.
    pub(crate) late_for_queue: bool,
    /// Of the wait, until fewer sequences are decoded there than may be at a time.
    in_line_micros: f64,
    /// Of all, what would not be lost if the prompt were computed there.
    apart_micros: f64,
}

/// What decoding a request on an instance comes to.
struct Steps {
    /// Of each step with it in the batch.
    step_micros: f64,
    /// Of all of its own, and by how much it makes those of the others longer: as they count while the instance warms up.
    own: f64,
    others: f64,
}

/// Until decode begins.
struct Waits {
    /// Until few enough are decoded.
    in_line_micros: f64,
    /// Until it has blocks to begin with.
    blocks_micros: f64,
}

/// What an instance decodes while it computes a prompt: nothing, if it is one of prefill.
#[derive(Debug, Clone, Copy, Default)]
struct Decoding {
    /// Sequences that stand still meanwhile.
    batch: f64,
    /// How long they take after each chunk of the prompt.
    step_micros: f64,
    /// Until the prompt is begun with, as so many are decoded.
    in_line_micros: f64,
}

impl Decoding {
    /// Of the instance of which `then` is the price to decode this one, too.
    fn beside(row: &Row, then: &Price) -> Self {
        // On a mixed instance those that wait are prompts, which stand still for nothing.
        let batch = match row.role {
            Some(Role::Mixed) => row.standing.batch().min(row.standing.running),
            _ => row.standing.batch(),
        } as f64;
        let step_micros = if batch > 0.0 { then.tpot_micros } else { 0.0 };
        Self { batch, step_micros, in_line_micros: then.in_line_micros }
    }
}

/// Prices one request on any instance.
pub(crate) struct Pricing<'a> {
    pub(crate) ask: &'a Ask<'a>,
    pub(crate) settings: &'a Settings,
    pub(crate) model: &'a Model,
    pub(crate) now: Instant,
}

impl Pricing<'_> {
    /// `cached`: tokens of the prompt that the instance has.
    pub(crate) fn price(&self, row: &Row, side: Side, cached: u32) -> Price {
        match side {
            Side::Prefill => self.prefill(row, side, cached, Decoding::default()),
            Side::Decode => {
                let to_move = self.ask.prompt_tokens().saturating_sub(cached);
                self.decode(row, cached, to_move, row.queue_micros)
            }
            Side::Whole => {
                let then = self.decode(row, cached, 0, 0.0);
                both(self.prefill(row, side, cached, Decoding::beside(row, &then)), then)
            }
        }
    }

    /// All of it on a decode instance of which `decode` is the price to go on from what another computes; `None`: it has too
    /// much to do.
    pub(crate) fn local(&self, row: &Row, cached: u32, decode: &Price) -> Option<Price> {
        let room = match (row.standing.blocks_free, row.standing.blocks_total) {
            (Some(free), Some(total)) => {
                let left = free.saturating_sub(self.first_blocks(row, cached));
                left as f64 >= LOCAL_FREE_LEAST * total as f64
            }
            _ => true,
        };
        let steady = decode.tpot_micros <= self.settings.targets.tpot_micros();
        (room && steady).then(|| {
            let then = Price { micros: decode.micros - decode.apart_micros, ..*decode };
            both(self.prefill(row, Side::Whole, cached, Decoding::beside(row, &then)), then)
        })
    }

    /// `decoding`: what goes on there beside it.
    fn prefill(&self, row: &Row, side: Side, cached: u32, decoding: Decoding) -> Price {
        let Decoding { batch, step_micros, in_line_micros } = decoding;
        let tokens = u64::from(self.ask.prompt_tokens().saturating_sub(cached));
        let own = row
            .speed
            .prefill_micros(tokens as f64, attention_pairs(tokens, self.ask.prompt_tokens().into()) as f64);
        let wait = row.queue_micros / self.share(row);
        let waiting = if row.is_prefill() { self.waiting(row) } else { 0.0 };
        let between = row.speed.steps(tokens as f64) * step_micros;
        let ttft_micros = in_line_micros + row.queue_micros + own + between;
        let late = (ttft_micros - self.ttft_left_micros()).max(0.0);
        let late_for_queue = late > 0.0 && late <= row.queue_micros;
        // Of both parts on one instance decode pays for that.
        let short = if side == Side::Prefill { own * shortfall(row, self.ask, side, cached) } else { 0.0 };
        let micros = wait + (1.0 + waiting + batch) * own + between + short + LATE * late;
        Price { micros, ttft_micros, wait_micros: row.queue_micros, late_for_queue, ..Price::default() }
    }

    /// How many prompts stand in line behind one that it computes, on average.
    fn waiting(&self, row: &Row) -> f64 {
        let classes = self.model.classes.get(row.classes.clone()).unwrap_or_default();
        // Of those that it is of, the one with the most to prefill says the most.
        let widest = classes.iter().max_by_key(|class| class.prefills());
        widest.map_or(0.0, |class| class.waiting(WAITING_MOST))
    }

    /// With so many tokens of the prompt there already, and so many that come from elsewhere; it stands still for so long.
    fn decode(&self, row: &Row, cached: u32, to_move: u32, still_micros: f64) -> Price {
        let (Steps { step_micros, own, others }, waits) = (self.steps(row), self.waits(row, cached));
        let late = step_micros - self.settings.targets.tpot_micros();
        let late = f64::from(expected_tokens(self.ask)) * late.max(0.0);
        let short = own * shortfall(row, self.ask, Side::Decode, cached);
        let moved = f64::from(to_move) * row.spec.token_bytes as f64;
        let moving = moved / LINK_BYTES_PER_MICROSECOND * (1.0 + f64::from(row.transfers));
        let Waits { in_line_micros, blocks_micros } = waits;
        let apart_micros = moving + still_micros;
        let micros = own + others + short + in_line_micros + apart_micros + LATE * late;
        let wait_micros = in_line_micros.max(blocks_micros);
        Price {
            micros,
            tpot_micros: step_micros,
            wait_micros,
            in_line_micros,
            apart_micros,
            ..Price::default()
        }
    }

    fn steps(&self, row: &Row) -> Steps {
        let ask = self.ask;
        let (expected, choices) = (f64::from(expected_tokens(ask)), f64::from(ask.wanted.choices));
        let added = choices * (f64::from(ask.prompt_tokens()) + expected / 2.0);
        let (sequences, context) = (row.standing.batch() as f64, row.context_tokens());
        let with = |sequences, context| row.speed.step_micros(sequences + choices, context + added);
        let share = self.share(row);
        Steps {
            step_micros: with(sequences, context),
            own: expected * with(sequences / share, context / share),
            others: expected * (sequences / share) * row.speed.added_micros(choices, added),
        }
    }

    /// What it waits for are others' answers; how long they take does not grow with what it is to be spared.
    fn waits(&self, row: &Row, cached: u32) -> Waits {
        let (ask, standing) = (self.ask, &row.standing);
        let step = row.speed.step_micros(standing.batch() as f64, row.context_tokens());
        let answer = f64::from(ask.expected_tokens) * step;
        // All that are in use are given back in about the time of an answer, and more than these will never be free.
        let first = self.first_blocks(row, cached);
        let missing = first.saturating_sub(standing.blocks_free.unwrap_or(first));
        let used = standing.blocks_used();
        let awaited = (missing.min(used) + standing.blocks_short) as f64;
        Waits {
            in_line_micros: answer * standing.turns_before(ask.wanted.choices),
            blocks_micros: answer * awaited / used.max(1) as f64,
        }
    }

    /// What it begins with: blocks for the tokens that there are, and for each choice a last one of its own.
    fn first_blocks(&self, row: &Row, cached: u32) -> u64 {
        let all = blocks_for(row, self.ask.prompt_tokens().saturating_add(1));
        let all = all + u64::from(self.ask.wanted.choices.saturating_sub(1));
        all.saturating_sub(u64::from(cached / row.spec.block_tokens))
    }

    /// What is left of the time that the first token may take.
    fn ttft_left_micros(&self) -> f64 {
        match self.ask.wanted.first_token {
            Some(by) => by.saturating_duration_since(self.now).as_secs_f64() * 1e6,
            None => self.settings.targets.ttft_micros(self.ask.prompt_tokens()),
        }
    }

    /// How much of its peers' work it is to have by now. Where all of them have just been heard of, nobody is new.
    fn share(&self, row: &Row) -> f64 {
        let age = self.now.saturating_duration_since(row.ready_since);
        if age >= self.settings.warm_up {
            return 1.0;
        }
        let whole = self.settings.warm_up.min(self.model.eldest_age(row, self.now));
        if age >= whole { 1.0 } else { (age.as_secs_f64() / whole.as_secs_f64()).max(SHARE_LEAST) }
    }
}

/// Of both parts on one instance.
fn both(first: Price, then: Price) -> Price {
    Price {
        micros: first.micros + then.micros,
        ttft_micros: first.ttft_micros,
        wait_micros: first.wait_micros.max(then.wait_micros),
        late_for_queue: first.late_for_queue,
        ..then
    }
}

/// How much of the prompt an instance is expected to have. The last token is computed by whoever samples from it.
pub(crate) fn cached_tokens(row: &Row, ask: &Ask<'_>, side: Side) -> u32 {
    let Some((blocks, block_tokens)) = ask.held.blocks(row.number) else { return 0 };
    let usable = match side {
        Side::Decode => ask.prompt_tokens(),
        Side::Whole | Side::Prefill => ask.prompt_tokens().saturating_sub(1),
    };
    blocks.min(usable / block_tokens) * block_tokens
}

/// How much of the blocks that a part of the request takes there is not free, of 1.
fn shortfall(row: &Row, ask: &Ask<'_>, side: Side, cached: u32) -> f64 {
    let wanted = blocks_wanted(row, ask, side, cached) as f64;
    row.standing.blocks_free.map_or(0.0, |free| (wanted - free as f64).max(0.0) / wanted.max(1.0))
}

/// Whether more is asked for than it ever decodes at a time.
pub(crate) fn lacks_places(row: &Row, ask: &Ask<'_>) -> bool {
    row.standing.sequences_most.is_some_and(|most| ask.wanted.choices > most.get())
}

/// Whether the prompt and one more token could ever be held there, and all of its choices decoded.
pub(crate) fn fits(row: &Row, ask: &Ask<'_>) -> bool {
    let context = row.spec.context_tokens == 0 || ask.prompt_tokens() < row.spec.context_tokens;
    let blocks = blocks_for(row, ask.prompt_tokens().saturating_add(1));
    let held = row.standing.blocks_total.is_none_or(|total| blocks <= total);
    context && held && !lacks_places(row, ask)
}

fn blocks_for(row: &Row, tokens: u32) -> u64 {
    u64::from(tokens.div_ceil(row.spec.block_tokens))
}

/// Blocks that a part of the request takes there beside those that are cached: the prompt's once and each choice's own.
/// Never more than there are: whoever wants more is served with those.
pub(crate) fn blocks_wanted(row: &Row, ask: &Ask<'_>, side: Side, cached: u32) -> u64 {
    let own = match side {
        Side::Prefill => 1,
        Side::Whole | Side::Decode => expected_tokens(ask).saturating_mul(ask.wanted.choices),
    };
    let all = blocks_for(row, ask.prompt_tokens().saturating_add(own));
    let all = row.standing.blocks_total.map_or(all, |total| all.min(total));
    all.saturating_sub(u64::from(cached / row.spec.block_tokens))
}

pub(crate) fn expected_tokens(ask: &Ask<'_>) -> u32 {
    ask.wanted.max_tokens.min(ask.expected_tokens)
}
