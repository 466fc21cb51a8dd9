//! The W3C trace context (<https://www.w3.org/TR/trace-context/>) that carries a trace from one process to the next.

use std::str::FromStr;

use http::HeaderMap;
use opentelemetry::{
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::TraceState,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const PARENT: &str = "traceparent";
const STATE: &str = "tracestate";
/// Bytes of a `tracestate` that go on: as many as a tracing system may count on.
const STATE_MOST: usize = 512;

/// Where in which trace a request is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TraceContext {
    parent: String,
    state: String,
}

impl TraceContext {
    /// Of the two headers' values. Whatever is no trace context is left out: a `tracestate` alone means nothing.
    pub fn new(parent: &str, state: &str) -> Self {
        let Some(parent) = first_version(parent) else { return Self::default() };
        let state = Some(state).filter(|state| !state.is_empty() && state.len() <= STATE_MOST);
        let state = state.and_then(|state| TraceState::from_str(state).ok());
        Self { parent, state: state.map(|state| state.header()).unwrap_or_default() }
    }

    /// As a caller says it.
    pub fn sent(headers: &HeaderMap) -> Self {
        let text = |name| headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        let mut parents = text(PARENT);
        match (parents.next(), parents.next()) {
            (Some(parent), None) => Self::new(parent, &text(STATE).collect::<Vec<_>>().join(",")),
            _ => Self::default(),
        }
    }

    /// Of the current span; `None` unless traces are exported.
    pub fn current() -> Option<Self> {
        let mut context = Self::default();
        TraceContextPropagator::new().inject_context(&Span::current().context(), &mut context);
        Some(context).filter(|context| !context.parent.is_empty())
    }

    /// Makes `span` a child of it, if it is one. Call before the span is entered.
    pub fn adopt(&self, span: &Span) {
        let parent = TraceContextPropagator::new().extract(self);
        // Fails only where traces are not exported, and then there is nothing to join.
        let _ = span.set_parent(parent);
    }

    /// The value of `traceparent`, in the form of version 00; empty = none.
    pub fn parent(&self) -> &str {
        &self.parent
    }

    /// The value of `tracestate`; empty = none.
    pub fn state(&self) -> &str {
        &self.state
    }
}

impl Injector for TraceContext {
    fn set(&mut self, key: &str, value: String) {
        match key {
            PARENT => self.parent = value,
            STATE => self.state = value,
            _ => {}
        }
    }
}

impl Extractor for TraceContext {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            PARENT => Some(&self.parent),
            STATE => Some(&self.state),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec![PARENT, STATE]
    }
}

/// Of a later version than 00, which may have more parts, what 00 has ("Versioning of traceparent").
fn first_version(parent: &str) -> Option<String> {
    let mut parts = parent.splitn(5, '-');
    let mut part = |length: usize| {
        let is_hex = |part: &&str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        parts.next().filter(|part| part.len() == length).filter(is_hex)
    };
    let (version, trace, span, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
    let is_nought = |part: &str| part.bytes().all(|byte| byte == b'0');
    let has_more = parts.next().is_some();
    let wrong = version == "ff" || (version == "00" && has_more) || is_nought(trace) || is_nought(span);
    (!wrong).then(|| format!("00-{trace}-{span}-{flags}"))
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::{TraceContextExt, TracerProvider};
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    fn headers(all: &[(&'static str, &str)]) -> HeaderMap {
        let header = |(name, value): &(&'static str, &str)| {
            (http::HeaderName::from_static(name), value.parse().expect("a header's value"))
        };
        let mut headers = HeaderMap::new();
        all.iter().map(header).for_each(|(name, value)| _ = headers.append(name, value));
        headers
    }

    #[test]
    fn a_trace_goes_on_from_one_process_to_the_next() {
        let provider = SdkTracerProvider::builder().build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let first = TraceContext::new(&format!("00-{TRACE}-{SPAN}-01"), "congo=t61rcWkgMzE");
            let caller = tracing::info_span!("caller");
            first.adopt(&caller);
            let context = caller.in_scope(TraceContext::current).expect("is exported");
            assert!(context.parent().contains(TRACE) && !context.parent().contains(SPAN), "{context:?}");
            assert_eq!(context.state(), "congo=t61rcWkgMzE");
            let callee = tracing::info_span!("callee");
            context.adopt(&callee);
            let trace = |span: &Span| span.context().span().span_context().trace_id();
            assert_eq!(trace(&caller), trace(&callee));
            let stranger = tracing::info_span!("stranger");
            TraceContext::default().adopt(&stranger);
            assert_ne!(trace(&caller), trace(&stranger));
        });
    }

    #[test]
    fn without_traces_there_is_none() {
        assert_eq!(tracing::info_span!("x").in_scope(TraceContext::current), None);
    }

    #[test]
    fn only_what_is_a_trace_context_goes_on() {
        let (no_trace, no_span) = ("0".repeat(32), "0".repeat(16));
        let passed = |value: &str| TraceContext::sent(&headers(&[(PARENT, value)])).parent;
        let first = format!("00-{TRACE}-{SPAN}-01");
        assert_eq!(passed(&first), first);
        assert_eq!(passed(&format!("cc-{TRACE}-{SPAN}-01")), first);
        assert_eq!(passed(&format!("cc-{TRACE}-{SPAN}-01-more-of it")), first);
        for none in [
            "",
            "00",
            &format!("{first}-"),
            &format!("{first}-more"),
            &format!("ff-{TRACE}-{SPAN}-01"),
            &format!("00-{no_trace}-{SPAN}-01"),
            &format!("00-{TRACE}-{no_span}-01"),
            &format!("00-{TRACE}-{SPAN}-0x"),
            &format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            &format!("00-{TRACE}-{SPAN}"),
            &format!("cc-{TRACE}-{SPAN}-011"),
        ] {
            assert_eq!(passed(none), "", "{none}");
        }
        let twice = headers(&[(PARENT, &first), (PARENT, &first)]);
        assert_eq!(TraceContext::sent(&twice), TraceContext::default());
    }

    #[test]
    fn states_of_all_headers_go_on_with_a_parent() {
        let first = format!("00-{TRACE}-{SPAN}-01");
        let state = |all: &[(&'static str, &str)]| TraceContext::sent(&headers(all)).state;
        assert_eq!(state(&[(PARENT, &first), (STATE, "a=1"), (STATE, "b=2,c=3")]), "a=1,b=2,c=3");
        assert_eq!(state(&[(STATE, "a=1")]), "", "there is no trace");
        assert_eq!(state(&[(PARENT, &first), (STATE, "no state")]), "");
        assert_eq!(state(&[(PARENT, &first), (STATE, &format!("a={}", "x".repeat(STATE_MOST)))]), "");
        assert!(TraceContext::new(&first, "no state").parent().contains(TRACE), "the trace itself goes on");
    }
}
