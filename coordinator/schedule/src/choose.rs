//! The choice itself: one walk over the rows of a model, then a look at the pairs of the best.

mod candidate;
mod walk;

use std::collections::HashSet;

use tokio::time::Instant;

use crate::{
    Ask, NoPlace, Placement, Receipt, RunnerUp, Side,
    cost::{expected_tokens, fits, lacks_places},
    settings::{Policy, Settings},
    view::{Model, View},
};

use candidate::{Best, Candidate};
use walk::{Found, Halves, Walk, chance};

/// Candidates for a part of the work that a receipt keeps, the best.
const RECEIPT_MOST: usize = 4;

/// A way to serve the request, and what it costs.
#[derive(Clone, Copy)]
enum Way<'a> {
    Alone(Candidate<'a>),
    /// Prefill and decode, and what the handoff between them costs.
    Apart(Candidate<'a>, Candidate<'a>, f64),
}

impl<'a> Way<'a> {
    /// Who prefills and who decodes; one instance alone twice.
    fn pair(&self) -> [&Candidate<'a>; 2] {
        match self {
            Self::Alone(alone) => [alone; 2],
            Self::Apart(prefill, decode, _) => [prefill, decode],
        }
    }

    /// What it costs, and the handoff's part of that.
    fn micros(&self) -> (f64, f64) {
        match self {
            Self::Alone(alone) => (alone.price.micros, 0.0),
            Self::Apart(prefill, decode, handoff) => {
                (prefill.price.micros + decode.price.micros + handoff, *handoff)
            }
        }
    }

    fn rank(&self, policy: Policy) -> f64 {
        match self {
            // When the one of the two was chosen that was chosen last.
            Self::Apart(prefill, decode, _) if policy == Policy::RoundRobin => prefill.rank.max(decode.rank),
            Self::Alone(alone) => alone.rank,
            Self::Apart(prefill, decode, handoff) => prefill.rank + decode.rank + handoff,
        }
    }

    /// How many of its instances are full.
    fn full(&self) -> usize {
        match self {
            Self::Alone(alone) => usize::from(alone.full),
            Self::Apart(prefill, decode, _) => usize::from(prefill.full) + usize::from(decode.full),
        }
    }

    /// Whether a decode instance computes the prompt.
    fn is_local(&self) -> bool {
        matches!(self, Self::Alone(alone) if alone.row.side() == Some(Side::Decode))
    }

    fn numbers(&self) -> [u32; 2] {
        self.pair().map(|candidate| candidate.row.number)
    }

    fn ties(&self) -> [(u64, u64); 2] {
        self.pair().map(|candidate| candidate.tie)
    }
}

/// Chooses where `ask` goes.
pub(crate) fn choose(
    view: &View,
    ask: &Ask<'_>,
    settings: &Settings,
    now: Instant,
) -> Result<(Placement, Receipt), NoPlace> {
    let Some(model) = view.model(ask.wanted.revision) else {
        return Err(nobody(view, ask, now));
    };
    let avoided = ask.wanted.avoid.iter().filter_map(|id| view.row(id)).map(|row| row.number);
    let avoided: Vec<u32> = avoided.collect();
    let mut found = Walk::new(model, ask, &avoided, settings, now).found();
    if is_of_one_token(ask) {
        for prefill in found.classes.iter().flat_map(|halves| &halves.prefill.held) {
            let is = |held: &Candidate<'_>| held.row.number == prefill.row.number;
            if !found.whole.held.iter().any(is) {
                found.whole.offer(*prefill);
            }
        }
    }
    let Some((way, runner_up)) = chosen(view, &found, ask, settings, now) else {
        return Err(lack(&found, model, ask));
    };
    if !found.has_room(&way, ask) {
        return Err(NoPlace::Busy);
    }
    let placement = match &way {
        Way::Alone(alone) => Placement::Alone(alone.assignee(ask)),
        Way::Apart(prefill, decode, _) => {
            Placement::Apart { prefill: prefill.assignee(ask), decode: decode.assignee(ask) }
        }
    };
    Ok((placement, receipt(&found, &way, runner_up, ask, settings)))
}

/// One token is the work of one instance: nothing is reserved on another, or handed over.
fn is_of_one_token(ask: &Ask<'_>) -> bool {
    ask.wanted.max_tokens == 1 && ask.wanted.among.handed_on_by().is_none()
}

/// Of the two that were drawn whoever has room, and then whoever has fewer sequences.
fn of_two<'b, 'a>(best: &'b Best<'a>) -> impl Iterator<Item = &'b Candidate<'a>> {
    let drawn = best.held.iter().take(2);
    drawn.min_by_key(|candidate| (candidate.full, candidate.row.standing.sequences)).into_iter()
}

/// The way that is taken, and the best of the others.
fn chosen<'a>(
    view: &View,
    found: &Found<'a>,
    ask: &Ask<'_>,
    settings: &Settings,
    now: Instant,
) -> Option<(Way<'a>, Option<Way<'a>>)> {
    let mut ways: Vec<Way<'a>> = Vec::new();
    match settings.policy {
        Policy::Predicted => {
            ways.extend(found.whole.held.iter().copied().map(Way::Alone));
            for halves in &found.classes {
                for prefill in &halves.prefill.held {
                    let handoff = |decode: &Candidate<'_>| view.handoff_micros(prefill.row, decode.row, now);
                    let decodes = halves.decode.held.iter();
                    ways.extend(decodes.map(|decode| Way::Apart(*prefill, *decode, handoff(decode))));
                }
                if halves.is_whole() {
                    ways.extend(halves.local.held.iter().copied().map(Way::Alone));
                }
            }
        }
        Policy::PowerOfTwo => {
            ways.extend(of_two(&found.whole).copied().map(Way::Alone));
            for halves in &found.classes {
                let pair = of_two(&halves.prefill).zip(of_two(&halves.decode));
                ways.extend(pair.map(|(prefill, decode)| Way::Apart(*prefill, *decode, 0.0)));
            }
        }
        Policy::LeastLoad | Policy::RoundRobin => {
            ways.extend(found.whole.first().copied().map(Way::Alone));
            for halves in &found.classes {
                let pair = halves.prefill.first().zip(halves.decode.first());
                ways.extend(pair.map(|(prefill, decode)| Way::Apart(*prefill, *decode, 0.0)));
            }
        }
    }
    if is_of_one_token(ask) {
        ways.retain(|way| matches!(way, Way::Alone(_)));
    }
    if found.classes.len() > 1 {
        // Who is of several classes has been found in each.
        let mut seen = HashSet::new();
        ways.retain(|way| seen.insert(way.numbers()));
    }
    let rank = |way: &Way<'_>| way.rank(settings.policy);
    let order = |a: &&Way<'_>, b: &&Way<'_>| {
        a.full().cmp(&b.full()).then(rank(a).total_cmp(&rank(b))).then(a.ties().cmp(&b.ties()))
    };
    let best = ways.iter().min_by(order)?;
    let taken = if settings.temperature == 0.0 || settings.policy != Policy::Predicted {
        best
    } else {
        let least = rank(best).max(1.0);
        let weight = |way: &Way<'_>| match way.full() == best.full() {
            true => (-(rank(way) - least) / (settings.temperature * least)).exp(),
            false => 0.0,
        };
        let mut left = chance(ask.nth, 0) as f64 / u64::MAX as f64 * ways.iter().map(weight).sum::<f64>();
        let drawn = ways.iter().find(|way| {
            left -= weight(way);
            left <= 0.0
        });
        drawn.unwrap_or(best)
    };
    let others = ways.iter().filter(|way| way.numbers() != taken.numbers());
    Some((*taken, others.min_by(order).copied()))
}

fn receipt(
    found: &Found<'_>,
    way: &Way<'_>,
    runner_up: Option<Way<'_>>,
    ask: &Ask<'_>,
    settings: &Settings,
) -> Receipt {
    let of = |side: Side| {
        let halves = found.classes.iter();
        halves.flat_map(move |halves| match side {
            Side::Prefill => &halves.prefill.held,
            Side::Decode => &halves.decode.held,
            Side::Whole => &halves.local.held,
        })
    };
    let mut shown: Vec<Candidate<'_>> = Vec::new();
    let wholes = found.whole.held.iter().chain(of(Side::Whole)).copied().collect();
    for mut alike in
        [wholes, of(Side::Prefill).copied().collect::<Vec<_>>(), of(Side::Decode).copied().collect()]
    {
        alike.sort_by(Candidate::order);
        alike.dedup_by_key(|candidate| candidate.row.number);
        shown.extend(alike.into_iter().take(RECEIPT_MOST));
    }
    for taken in way.pair().map(|candidate| *candidate) {
        let is = |held: &Candidate<'_>| held.row.number == taken.row.number && held.side == taken.side;
        if !shown.iter().any(is) {
            shown.push(taken);
        }
    }
    shown.sort_by(|a, b| a.price.micros.total_cmp(&b.price.micros));
    Receipt {
        prompt_tokens: ask.prompt_tokens(),
        expected_tokens: expected_tokens(ask),
        choices: ask.wanted.choices,
        policy: settings.policy,
        candidates: found.candidates,
        left_aside: found.left_aside,
        cost_micros: way.micros().0 as u64,
        handoff_micros: way.micros().1 as u64,
        runner_up: runner_up.map(|way| {
            let [prefill, decode] = way.pair().map(|candidate| candidate.row.spec.id.clone());
            RunnerUp { prefill, decode, cost_micros: way.micros().0 as u64 }
        }),
        cheapest: shown.iter().map(|candidate| candidate.scored(ask)).collect(),
    }
}

/// No instance of the model is known.
fn nobody(view: &View, ask: &Ask<'_>, now: Instant) -> NoPlace {
    if view.others_serve(ask.wanted.revision, now) { NoPlace::OtherModel } else { NoPlace::NoInstance }
}

/// Why nobody takes the request. It is too large only if none of those that are not ready just now might hold it.
fn lack(found: &Found<'_>, model: &Model, ask: &Ask<'_>) -> NoPlace {
    let small = |halves: &Halves<'_>| halves.prefill.too_small || halves.decode.too_small;
    // In all of its classes nobody is there for the other half.
    let lacks = |candidate: &Candidate<'_>, other: for<'h> fn(&'h Halves<'_>) -> &'h Best<'h>| {
        found.classes[candidate.row.classes.clone()].iter().all(|halves| other(halves).is_vacant())
    };
    let mut prefills = found.classes.iter().flat_map(|halves| &halves.prefill.held);
    let mut decodes = found.classes.iter().flat_map(|halves| &halves.decode.held);
    if prefills.any(|prefill| lacks(prefill, |halves| &halves.decode)) {
        NoPlace::NoDecode
    } else if decodes.any(|decode| lacks(decode, |halves| &halves.prefill)) {
        NoPlace::NoPrefill
    } else if found.ready == model.rows.len() && (found.whole.too_small || found.classes.iter().any(small)) {
        let mut small = model.rows.iter().filter(|row| !fits(row, ask));
        match small.all(|row| lacks_places(row, ask)) {
            true => NoPlace::TooManyChoices(ask.wanted.choices),
            false => NoPlace::TooLarge(ask.prompt_tokens()),
        }
    } else {
        NoPlace::NoInstance
    }
}

#[cfg(test)]
mod tests;
