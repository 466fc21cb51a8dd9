//! Who could take which part of a request: one walk over the rows of a model.

use baton_proto::InstanceId;
use tokio::time::Instant;

use super::{
    Way,
    candidate::{Best, Candidate},
    is_of_one_token,
};
use crate::{
    Among, Ask, LeftAside, Side,
    cost::{Price, Pricing, cached_tokens, fits},
    settings::{Policy, Settings},
    view::{Class, Model, Row},
};

/// The best of each role in a class.
#[derive(Default)]
pub(super) struct Halves<'a> {
    pub(super) prefill: Best<'a>,
    pub(super) decode: Best<'a>,
    /// Decode instances that would compute the prompt as well.
    pub(super) local: Best<'a>,
    /// An instance that prefills is left aside.
    pub(super) avoids_prefill: bool,
}

impl Halves<'_> {
    /// Whether prefill has too much to do for the prompt, or failed it.
    fn needs_relief(&self) -> bool {
        self.prefill.first().map_or(self.avoids_prefill, |prefill| prefill.price.late_for_queue)
    }

    /// Whether decode instances may compute the prompt: they are not to become mixed ones for want of prefill.
    pub(super) fn is_whole(&self) -> bool {
        !self.prefill.is_vacant() || self.avoids_prefill
    }
}

/// What the walk finds.
pub(super) struct Found<'a> {
    pub(super) whole: Best<'a>,
    pub(super) classes: Vec<Halves<'a>>,
    /// Instances that are ready, and not left out.
    pub(super) ready: usize,
    pub(super) candidates: usize,
    pub(super) left_aside: LeftAside,
}

impl<'a> Found<'a> {
    /// Takes for the only one to prefill who has computed it all, but for what lies in a block that is not full.
    fn hands_on(&mut self, model: &'a Model, from: &InstanceId, ask: &Ask<'_>) {
        let reached = |row: &&Row| row.spec.id == *from && row.role_epoch.is_some();
        let Some(row) = model.rows.iter().find(reached) else { return };
        let cached = ask.prompt_tokens().saturating_sub(1) / row.spec.block_tokens * row.spec.block_tokens;
        let (price, full, rank, tie) = (Price::default(), false, 0.0, (row.chosen, 0));
        for Halves { prefill, .. } in &mut self.classes[row.classes.clone()] {
            prefill.roomy = true;
            prefill.offer(Candidate { row, side: Side::Prefill, cached, price, full, rank, tie });
        }
    }

    /// Whether there is room on any that could compute the prompt, and on any that could decode. Who does it is whoever is
    /// best all the same: if the others are about to be idle, it is worth more to wait for what one has cached. Decode instances
    /// that would compute it make room for those prompts alone that they are best for.
    pub(super) fn has_room(&self, way: &Way<'_>, ask: &Ask<'_>) -> bool {
        let pair = |halves: &Halves<'_>| is_of_one_token(ask) || halves.decode.roomy;
        let roomy = |halves: &Halves<'_>| {
            (halves.prefill.roomy && pair(halves)) || (halves.local.roomy && way.is_local())
        };
        self.whole.roomy || self.classes.iter().any(roomy)
    }
}

/// See the module.
pub(super) struct Walk<'a, 'b> {
    model: &'a Model,
    ask: &'b Ask<'b>,
    /// The numbers of those that are left aside.
    avoided: &'b [u32],
    settings: &'b Settings,
    now: Instant,
    pricing: Pricing<'b>,
    /// How long it may wait where as many wait as may, and elsewhere.
    rooms_micros: [f64; 2],
    /// Decode instances may compute it.
    locally: bool,
}

impl<'a, 'b> Walk<'a, 'b> {
    pub(super) fn new(
        model: &'a Model,
        ask: &'b Ask<'b>,
        avoided: &'b [u32],
        settings: &'b Settings,
        now: Instant,
    ) -> Self
    where
        'a: 'b,
    {
        let rooms_micros = match ask.wanted.among {
            Among::Roomy => [f64::NEG_INFINITY, settings.room.as_secs_f64() * 1e6],
            Among::Waiting => [f64::NEG_INFINITY, f64::INFINITY],
            Among::All | Among::PeersOf(_) => [f64::INFINITY; 2],
        };
        let predicted = settings.policy == Policy::Predicted;
        let handed_on = ask.wanted.among.handed_on_by().is_some();
        Self {
            model,
            ask,
            avoided,
            settings,
            now,
            pricing: Pricing { ask, settings, model, now },
            rooms_micros,
            locally: settings.local_prefill_tokens > 0 && predicted && !handed_on,
        }
    }

    pub(super) fn found(&self) -> Found<'a> {
        let mut found = Found {
            whole: Best::default(),
            classes: self.model.classes.iter().map(|_: &Class| Halves::default()).collect(),
            ready: 0,
            candidates: 0,
            left_aside: LeftAside::default(),
        };
        self.model.rows.iter().for_each(|row| self.look_at(row, &mut found));
        if self.locally {
            found
                .classes
                .iter_mut()
                .filter(|halves| halves.needs_relief())
                .for_each(|halves| self.relieve(halves));
        }
        if let Some(from) = self.ask.wanted.among.handed_on_by() {
            found.hands_on(self.model, from, self.ask);
        }
        found
    }

    fn look_at(&self, row: &'a Row, found: &mut Found<'a>) {
        if !row.is_usable(self.now) {
            found.left_aside.away += 1;
            return;
        }
        if self.is_avoided(row) {
            found.left_aside.avoided += 1;
            let avoids = row.side() == Some(Side::Prefill);
            found.classes[row.classes.clone()].iter_mut().for_each(|halves| halves.avoids_prefill |= avoids);
            return;
        }
        found.ready += 1;
        let side = match (row.side(), self.ask.wanted.among.handed_on_by()) {
            (Some(Side::Whole | Side::Decode), Some(from)) if row.spec.id != *from => Side::Decode,
            (Some(side), None) => side,
            _ => return,
        };
        let offered = fits(row, self.ask).then(|| {
            let cached = cached_tokens(row, self.ask, side);
            self.candidate(row, side, cached, self.pricing.price(row, side, cached))
        });
        found.left_aside.full += u32::from(is_full(row));
        found.candidates += usize::from(offered.is_some());
        found.left_aside.too_small += u32::from(offered.is_none());
        let (classes, room_micros) = (&mut found.classes[row.classes.clone()], self.room_micros(row));
        match side {
            Side::Whole => found.whole.take(offered, room_micros),
            Side::Prefill => classes.iter_mut().for_each(|halves| halves.prefill.take(offered, room_micros)),
            Side::Decode => classes.iter_mut().for_each(|halves| halves.decode.take(offered, room_micros)),
        }
        if self.locally
            && side == Side::Decode
            && let Some(decode) = &offered
        {
            let cached = cached_tokens(row, self.ask, Side::Whole);
            if !self.is_long(cached)
                && let Some(candidate) = self.local(decode, cached)
            {
                classes.iter_mut().for_each(|halves| halves.local.take(Some(candidate), room_micros));
            }
        }
    }

    /// Whoever is best to decode may compute a long prompt, too.
    fn relieve(&self, halves: &mut Halves<'a>) {
        for decode in &halves.decode.held {
            let cached = cached_tokens(decode.row, self.ask, Side::Whole);
            if self.is_long(cached)
                && let Some(candidate) = self.local(decode, cached)
            {
                halves.local.take(Some(candidate), self.room_micros(decode.row));
            }
        }
    }

    /// As one that computes the prompt as well, if it is not too busy.
    fn local(&self, decode: &Candidate<'a>, cached: u32) -> Option<Candidate<'a>> {
        let price = self.pricing.local(decode.row, cached, &decode.price)?;
        Some(self.candidate(decode.row, Side::Whole, cached, price))
    }

    fn is_long(&self, cached: u32) -> bool {
        self.ask.prompt_tokens().saturating_sub(cached) > self.settings.local_prefill_tokens
    }

    fn is_avoided(&self, row: &Row) -> bool {
        self.avoided.contains(&row.number)
    }

    fn room_micros(&self, row: &Row) -> f64 {
        let [of_full, of_others] = self.rooms_micros;
        if is_full(row) { of_full } else { of_others }
    }

    fn candidate(&self, row: &'a Row, side: Side, cached: u32, price: Price) -> Candidate<'a> {
        let tie = (row.chosen, chance(self.ask.nth, row.number));
        let rank = rank(self.settings.policy, row, &price, tie.1);
        Candidate { row, side, cached, price, full: is_full(row), rank, tie }
    }
}

/// Whether as many wait there as may.
fn is_full(row: &Row) -> bool {
    row.standing.waiting_room == Some(0)
}

/// Chance that is the same for everybody who asks: which of equals comes first differs from request to request.
pub(super) fn chance(nth: u64, number: u32) -> u64 {
    let mut chance = nth.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(number) << 17);
    chance = (chance ^ (chance >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    chance = (chance ^ (chance >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    chance ^ (chance >> 31)
}

fn rank(policy: Policy, row: &Row, price: &Price, chance: u64) -> f64 {
    match policy {
        Policy::Predicted => price.micros,
        Policy::LeastLoad => row.standing.sequences as f64,
        Policy::RoundRobin => row.chosen as f64,
        // The two that come first are drawn by this; between them it is decided afterwards.
        Policy::PowerOfTwo => chance as f64,
    }
}
