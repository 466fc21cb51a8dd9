//! Nodes, and peers that play by the rules or do not, over loopback: one program, as each is slow to build. What needs a
//! process, a network or a library of its own is beside it.

mod abort;
mod broken_stream;
mod crowd;
mod early_offers;
mod handoff;
mod leases;
mod limits;
mod lying_announcer;
mod lying_mapped;
mod lying_peer;
mod mapped;
mod paths;
mod silent_link;
mod stopped;
#[path = "../support/mod.rs"]
mod support;
