//! This crate's own placement, asked as the coordinator asks it: through the board, with the ledger of what is under way.
//!
//! All here that knows how production is called is in this file.

use std::{collections::HashMap, sync::Arc, time::Duration};

use baton_coordinator::{
    fleet::{Duty, Load, Role, Spec},
    schedule::{
        Placement, Seat,
        board::{Board, Credit},
    },
};
use baton_proto::{GroupName, Incarnation, InstanceId, RoleEpoch};
use tokio::time::Instant;

use super::{
    chooser::{Choice, Chooser, Place, Report, Sight},
    trace::LONGEST_TOKENS,
};

/// Tokens of a KV block of the instances.
const BLOCK_TOKENS: u32 = 16;
/// What requests allow their answers; how long these turn out nobody knows beforehand.
const MAX_TOKENS: u32 = 2_000;
pub(crate) const REVISION: &str = "simulated";

pub(crate) fn id(place: Place) -> InstanceId {
    let name = match place {
        Place::Prefill(index) => format!("p{index:05}"),
        Place::Decode(index) => format!("d{index:05}"),
    };
    InstanceId::new(name).expect("letters and digits are an id")
}

/// A board on which all instances are up, and have not said how busy they are.
pub(crate) fn board(prefills: usize, decodes: usize) -> Arc<Board> {
    let board = Board::new(Duration::from_secs(60));
    let places = (0..decodes).map(Place::Decode).chain((0..prefills).map(Place::Prefill));
    let places: Vec<Place> = places.collect();
    let specs: Vec<Spec> = places.iter().map(|place| spec(id(*place))).collect();
    board.list(&specs, Instant::now());
    for (place, spec) in places.iter().zip(&specs) {
        let role = match place {
            Place::Prefill(_) => Role::Prefill,
            Place::Decode(_) => Role::Decode,
        };
        board.up(&spec.id, spec.incarnation, Duty { role, epoch: RoleEpoch(1), ready: true });
    }
    board
}

fn spec(id: InstanceId) -> Spec {
    Spec {
        inference_endpoint: format!("{id}:1"),
        handoff_endpoint: format!("{id}:2"),
        id,
        incarnation: Incarnation(1),
        group: GroupName::default(),
        model: REVISION.into(),
        revision: REVISION.into(),
        context_tokens: 2 * LONGEST_TOKENS,
        layout: "one".into(),
        block_tokens: BLOCK_TOKENS,
    }
}

pub(crate) fn load(place: Place, report: &Report) -> Load {
    let rate = report.tokens_per_second as u64;
    Load {
        sequences: report.sequences,
        queued_prefill_tokens: report.queued_tokens,
        kv_blocks_total: report.cache_tokens / BLOCK_TOKENS,
        kv_blocks_free: report.cache_free_tokens / BLOCK_TOKENS,
        prefill_tokens_per_second: if matches!(place, Place::Prefill(_)) { rate } else { 0 },
        decode_step_micros: report.step_micros,
    }
}

pub(crate) struct Production {
    board: Arc<Board>,
    places: HashMap<InstanceId, usize>,
    under_way: HashMap<usize, Credit>,
}

impl Production {
    pub(crate) fn new(prefills: usize, decodes: usize) -> Self {
        let all = (0..prefills).map(|index| (id(Place::Prefill(index)), index));
        let places = all.chain((0..decodes).map(|index| (id(Place::Decode(index)), index))).collect();
        Self { board: board(prefills, decodes), places, under_way: HashMap::new() }
    }

    fn place(&self, seat: &Seat) -> usize {
        self.places[&seat.instance]
    }
}

impl Chooser for Production {
    fn choose(&mut self, sight: &Sight<'_>) -> Choice {
        let booked = self.board.place(sight.request.prompt_tokens, (MAX_TOKENS, 1), REVISION, None);
        let booked = booked.expect("both roles are there, and no prompt is longer than what they hold");
        let choice = match &booked.placement {
            Placement::Apart { prefill, decode } => {
                Choice { prefill: self.place(prefill), decode: self.place(decode) }
            }
            Placement::Alone(seat) => panic!("{} is of no role that does everything", seat.instance),
        };
        self.under_way.insert(sight.index, booked.credit);
        choice
    }

    fn prefilled(&mut self, index: usize, _: u64) {
        if let Some(credit) = self.under_way.get_mut(&index) {
            credit.prefilled();
        }
    }

    fn handed_off(&mut self, index: usize) {
        if let Some(credit) = self.under_way.get_mut(&index) {
            credit.handed_off();
        }
    }

    fn finished(&mut self, index: usize) {
        self.under_way.remove(&index);
    }

    fn heard(&mut self, place: Place, report: &Report) {
        self.board.load(&id(place), load(place, report));
    }
}
