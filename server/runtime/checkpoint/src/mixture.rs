//! A mixture of experts as a configuration describes it: how many, how wide, and how a token's few are chosen.

use crate::config::within;

/// The experts of a model. All layers that have them have as many and choose alike.
#[derive(Debug, Clone, PartialEq)]
pub struct Mixture {
    /// Experts of a layer to choose from.
    pub experts: u32,
    /// How many of them each token goes through.
    pub experts_per_token: u32,
    /// Width of an expert between gate/up and down.
    pub expert_ffn: u32,
    /// Width of the experts together that every token goes through; 0 = there are none.
    pub shared_ffn: u32,
    pub routing: Routing,
    /// Layers with a dense block instead, ascending.
    pub dense_layers: Vec<u32>,
}

/// How a token's experts are chosen and weighed.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    pub scores: RouterScores,
    /// Only experts of the best groups may be chosen.
    pub groups: Option<ExpertGroups>,
    /// A stored bias is added to the scores for choosing, but not for weighing.
    pub correction_bias: bool,
    /// The weights of the chosen are divided by their sum.
    pub normalise: bool,
    /// Factor of all weights, applied last.
    pub scale: f32,
}

/// What makes scores of the router's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterScores {
    Softmax,
    Sigmoid,
}

/// Experts in groups of equal size, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Divides the number of experts.
    pub groups: u32,
    /// How many groups may be chosen from.
    pub chosen: u32,
    pub score: GroupScore,
}

/// What a group is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert's score.
    Best,
    /// The sum of its two best experts' scores.
    BestTwo,
}

impl Mixture {
    /// Whether this layer has the mixture.
    pub fn at(&self, layer: u32) -> bool {
        self.dense_layers.binary_search(&layer).is_err()
    }

    /// Checks that the numbers fit together; the error is (field, reason).
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        within(&[
            ("experts", self.experts, 1 << 14),
            ("experts of a token", self.experts_per_token, self.experts),
            ("feed-forward size of an expert", self.expert_ffn, 1 << 22),
            ("feed-forward size of shared experts", self.shared_ffn.max(1), 1 << 22),
        ])?;
        if !self.routing.scale.is_finite() {
            return Err(("factor of experts' weights", format!("{} is not a number", self.routing.scale)));
        }
        let Some(groups) = self.routing.groups else { return Ok(()) };
        within(&[
            ("groups of experts", groups.groups, self.experts),
            ("chosen groups of experts", groups.chosen, groups.groups),
        ])?;
        if !self.experts.is_multiple_of(groups.groups) {
            let reason = format!("{} does not divide {} experts", groups.groups, self.experts);
            return Err(("groups of experts", reason));
        }
        let size = self.experts / groups.groups;
        if size < 2 && groups.score == GroupScore::BestTwo {
            return Err(("groups of experts", "the two best experts of a group of one".to_owned()));
        }
        if self.experts_per_token > groups.chosen * size {
            let reason = format!("{} are more than {} groups have", self.experts_per_token, groups.chosen);
            return Err(("experts of a token", reason));
        }
        Ok(())
    }
}
