//! Replays a trace on virtual time: requests arrive, a [`chooser::Chooser`] says where each goes, simulated prefill and
//! decode instances serve them.
//!
//! [`simulation::run`] is the whole: pure, and the same for the same seed. What comes in is a [`trace`], what comes out
//! are [`figures`]. Choosers are [`coordinators`], each of which is [`production`], this crate's own placement, and
//! [`peers`], the published formulas of others; all see the same: prompts, what each cache holds at that very moment, and
//! load reports that are up to half a second old. [`machine`] says how long things take, [`prefill`], [`decode`] and
//! [`cache`] what happens in an instance.

pub(crate) mod cache;
pub(crate) mod chooser;
pub(crate) mod coordinators;
pub(crate) mod decode;
pub(crate) mod figures;
pub(crate) mod machine;
pub(crate) mod peers;
pub(crate) mod prefill;
pub(crate) mod production;
pub(crate) mod simulation;
pub(crate) mod synthetic;
pub(crate) mod trace;
