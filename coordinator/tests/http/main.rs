//! The coordinator over HTTP, against scripted instances on loopback and an embedded store.

mod answers;
mod bodies;
mod bugs;
mod choices;
mod coordinators;
mod drains;
mod failures;
mod faulty;
mod handoffs;
mod keys;
mod left;
mod line;
mod local;
mod migrations;
mod models;
mod operators;
mod outgrown;
mod prefix;
mod real_text;
mod scripted;
mod stalls;
mod unread;
mod wire;
