//! Which experts a row goes to, and with what weights: one row at a time, so that others in the batch do not matter.

use baton_checkpoint::{ExpertGroups, GroupScore, Mixture, RouterScores};

/// The experts of each row, ascending, and their weights.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    pub(crate) per_row: usize,
    /// `[rows][per_row]`.
    pub(crate) experts: Vec<u32>,
    /// `[rows][per_row]`.
    pub(crate) weights: Vec<f32>,
}

/// Memory kept from row to row.
#[derive(Debug, Default)]
pub(crate) struct Room {
    scores: Vec<f32>,
    choice: Vec<f32>,
    groups: Vec<f32>,
    taken: Vec<bool>,
}

impl Routes {
    /// Fills the routes of all rows of `logits`, `[rows][experts]`.
    pub(crate) fn fill(&mut self, logits: &[f32], bias: Option<&[f32]>, mixture: &Mixture, room: &mut Room) {
        let (experts, per_row) = (mixture.experts as usize, mixture.experts_per_token as usize);
        let rows = logits.len() / experts;
        self.per_row = per_row;
        self.experts.resize(rows * per_row, 0);
        self.weights.resize(rows * per_row, 0.0);
        let chosen = self.experts.chunks_exact_mut(per_row).zip(self.weights.chunks_exact_mut(per_row));
        for (logits, (experts, weights)) in logits.chunks_exact(experts).zip(chosen) {
            choose(logits, bias, mixture, room, (experts, weights));
        }
    }
}

/// Chooses and weighs one row's experts.
fn choose(
    logits: &[f32],
    bias: Option<&[f32]>,
    mixture: &Mixture,
    room: &mut Room,
    (experts, weights): (&mut [u32], &mut [f32]),
) {
    let routing = &mixture.routing;
    scores(logits, routing.scores, &mut room.scores);
    room.choice.clone_from(&room.scores);
    if let Some(bias) = bias {
        room.choice.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
    }
    if let Some(groups) = routing.groups {
        keep_best_groups(groups, room);
    }
    best(&room.choice, &mut room.taken, experts);
    experts.sort_unstable();
    for (weight, &expert) in weights.iter_mut().zip(&*experts) {
        *weight = room.scores[expert as usize];
    }
    // The tiny addend is DeepSeek's; beside scores of the best it is nothing, but it keeps all zeros from being 0 / 0.
    let sum = if routing.normalise { weights.iter().sum::<f32>() + 1e-20 } else { 1.0 };
    weights.iter_mut().for_each(|weight| *weight = *weight / sum * routing.scale);
}

fn scores(logits: &[f32], kind: RouterScores, out: &mut Vec<f32>) {
    out.clear();
    match kind {
        RouterScores::Softmax => {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            out.extend(logits.iter().map(|logit| (logit - largest).exp()));
            let sum: f32 = out.iter().sum();
            out.iter_mut().for_each(|score| *score /= sum);
        }
        RouterScores::Sigmoid => out.extend(logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp()))),
    }
}

/// Puts the experts of all but the best groups out of the choice.
fn keep_best_groups(groups: ExpertGroups, room: &mut Room) {
    let size = room.choice.len() / groups.groups as usize;
    let judged = room.choice.chunks_exact(size).map(|group| match groups.score {
        GroupScore::Best => group.iter().copied().fold(f32::NEG_INFINITY, larger),
        GroupScore::BestTwo => {
            let two = |(first, second): (f32, f32), &score: &f32| {
                if larger(first, score).to_bits() == first.to_bits() {
                    (first, larger(second, score))
                } else {
                    (score, first)
                }
            };
            let (first, second) = group.iter().fold((f32::NEG_INFINITY, f32::NEG_INFINITY), two);
            first + second
        }
    });
    room.groups.clear();
    room.groups.extend(judged);
    let mut chosen = vec![0; groups.chosen as usize];
    best(&room.groups, &mut room.taken, &mut chosen);
    for (group, scores) in room.choice.chunks_exact_mut(size).enumerate() {
        if !chosen.contains(&(group as u32)) {
            scores.fill(f32::NEG_INFINITY);
        }
    }
}

/// The larger by total order: a NaN is not lost.
fn larger(a: f32, b: f32) -> f32 {
    if a.total_cmp(&b).is_ge() { a } else { b }
}

/// The indices of the best scores, best first; of equal ones the first. Every index once, whatever the scores are.
fn best(scores: &[f32], taken: &mut Vec<bool>, out: &mut [u32]) {
    taken.clear();
    taken.resize(scores.len(), false);
    for to in out {
        let free = scores.iter().enumerate().filter(|&(index, _)| !taken[index]);
        let found = free.reduce(|best, next| if next.1.total_cmp(best.1).is_gt() { next } else { best });
        let index = found.map_or(0, |(index, _)| index);
        taken[index] = true;
        *to = index as u32;
    }
}

#[cfg(test)]
mod tests {
    use baton_checkpoint::Routing;

    use super::*;

    fn mixture(scores: RouterScores, groups: Option<(u32, u32, GroupScore)>, normalise: bool) -> Mixture {
        let groups = groups.map(|(groups, chosen, score)| ExpertGroups { groups, chosen, score });
        let routing = Routing { scores, groups, correction_bias: false, normalise, scale: 2.0 };
        Mixture {
            experts: 6,
            experts_per_token: 2,
            expert_ffn: 1,
            shared_ffn: 0,
            routing,
            dense_layers: vec![],
        }
    }

    fn route(logits: &[f32], bias: Option<&[f32]>, mixture: &Mixture) -> (Vec<u32>, Vec<f32>) {
        let mut routes = Routes::default();
        routes.fill(logits, bias, mixture, &mut Room::default());
        (routes.experts, routes.weights)
    }

    const LOGITS: [f32; 6] = [0.0, 3.0, -1.0, 2.0, 2.5, 1.0];

    #[test]
    fn the_best_are_chosen_and_listed_ascending() {
        let (experts, weights) = route(&LOGITS, None, &mixture(RouterScores::Softmax, None, true));
        assert_eq!(experts, [1, 4]);
        assert!((weights[0] - 2.0 / (1.0 + (-0.5f32).exp())).abs() < 1e-6, "{weights:?}");
        assert!((weights.iter().sum::<f32>() - 2.0).abs() < 1e-6);
        let (_, weights) = route(&LOGITS, None, &mixture(RouterScores::Sigmoid, None, false));
        assert!((weights[0] - 2.0 / (1.0 + (-3f32).exp())).abs() < 1e-6, "{weights:?}");
    }

    #[test]
    fn groups_are_judged_by_their_best_or_their_best_two() {
        let best = mixture(RouterScores::Softmax, Some((3, 1, GroupScore::Best)), false);
        assert_eq!(route(&LOGITS, None, &best).0, [0, 1]);
        let two = mixture(RouterScores::Sigmoid, Some((3, 1, GroupScore::BestTwo)), false);
        assert_eq!(route(&LOGITS, None, &two).0, [4, 5]);
        let halves = mixture(RouterScores::Sigmoid, Some((2, 1, GroupScore::BestTwo)), false);
        assert_eq!(route(&LOGITS, None, &halves).0, [3, 4]);
    }

    #[test]
    fn a_bias_chooses_but_does_not_weigh() {
        let bias = [0.0, 0.0, 5.0, 0.0, 0.0, 0.0];
        let (experts, weights) = route(&LOGITS, Some(&bias), &mixture(RouterScores::Sigmoid, None, false));
        assert_eq!(experts, [1, 2]);
        assert!((weights[1] - 2.0 / (1.0 + 1f32.exp())).abs() < 1e-6, "{weights:?}");
    }

    #[test]
    fn ties_and_what_is_no_number_still_give_distinct_experts() {
        let plain = mixture(RouterScores::Softmax, None, true);
        assert_eq!(route(&[1.0; 6], None, &plain).0, [0, 1]);
        let (experts, weights) = route(&[f32::NAN; 6], None, &plain);
        assert_eq!(experts, [0, 1]);
        assert!(weights.iter().all(|weight| weight.is_nan()));
        let groups = mixture(RouterScores::Sigmoid, Some((3, 2, GroupScore::BestTwo)), true);
        assert_eq!(route(&[f32::NAN; 6], None, &groups).0.len(), 2);
    }
}
