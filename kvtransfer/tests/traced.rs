//! A transfer's trace: each run of slices that a transport carried is an event in the span of its transfer.

mod support;

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use baton_proto::TransferId;
use support::*;
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id},
};
use tracing_subscriber::{Layer, Registry, layer::Context, layer::SubscriberExt, registry::LookupSpan};

const BLOCKS: [u32; 4] = [3, 4, 5, 9];

/// What a span or an event says, `name=value` each.
#[derive(Default)]
struct Fields(Vec<String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.push(format!("{}={value:?}", field.name()));
    }
}

impl Fields {
    fn number(&self, name: &str) -> Option<u32> {
        self.0.iter().find_map(|said| said.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
    }

    fn says(&self, what: &str) -> bool {
        self.0.iter().any(|said| said == what)
    }
}

/// A span's name and fields, and those of an event in it.
type Heard = (&'static str, Fields, Fields);

/// Keeps the events about slices.
#[derive(Clone, Default)]
struct Ear(Arc<Mutex<Vec<Heard>>>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Ear {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        context.span(id).expect("it is new").extensions_mut().insert(fields);
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        if !fields.0.iter().any(|said| said.starts_with("message=slices ")) {
            return;
        }
        let span = context.event_span(event).expect("in the span of its transfer");
        let of = span.extensions().get::<Fields>().map_or_else(Vec::new, |fields| fields.0.clone());
        self.0.lock().expect("not poisoned").push((span.name(), Fields(of), fields));
    }
}

#[tokio::test]
async fn every_run_is_traced_in_the_span_of_its_transfer_on_both_sides() {
    let ear = Ear::default();
    let _listening = tracing::subscriber::set_default(Registry::default().with(ear.clone()));
    let (prefill, decode) = (Peer::start("prefill-0"), Peer::start("decode-0"));
    let id = TransferId::generate();
    let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &BLOCKS)).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &BLOCKS)).expect("room");
    prefill.fill(1, &BLOCKS);
    (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..4));
    outgoing.seal(1);
    within("sealed", 10, incoming.sealed()).await.expect("whole");
    within("finished", 10, outgoing.finished()).await.expect("released");

    let heard = ear.0.lock().expect("not poisoned");
    for (span, peer, what) in
        [("kv_send", "decode-0", "slices sent"), ("kv_receive", "prefill-0", "slices received")]
    {
        let of: Vec<_> = heard.iter().filter(|(name, ..)| *name == span).collect();
        for (_, transfer, run) in &of {
            assert!(transfer.says(&format!("transfer={id}")), "{:?}", transfer.0);
            assert!(transfer.says(&format!("peer={peer}")), "{:?}", transfer.0);
            assert!(run.says(&format!("message={what}")) && run.says("transport=\"tcp\""), "{:?}", run.0);
            assert!(run.number("micros").is_some(), "{:?}", run.0);
        }
        for layer in 0..LAYERS {
            let runs = of.iter().filter(|(.., run)| run.number("layer") == Some(layer));
            let mut blocks: Vec<u32> = runs
                .flat_map(|(.., run)| {
                    let first = run.number("first").expect("said");
                    first..first + run.number("count").expect("said")
                })
                .collect();
            blocks.sort_unstable();
            assert_eq!(blocks, [0, 1, 2, 3], "of layer {layer} {what}");
        }
    }
}
